"""Which passages are found: chunks by their share of attention, spans around the best ones."""

from __future__ import annotations

import math

import pytest
import torch

from memorizing.huggingface.attaching.passages import (
    CHUNK_LEN,
    Collection,
    choose_spans,
    weigh_chunks,
)

LAYER, KEY_HEADS, GROUPS, QUERIES, WIDTH = 3, 2, 3, 5, 7
LENGTHS = (71, 1, 0, 130, CHUNK_LEN)


def make_collection(lengths: tuple[int, ...] = LENGTHS, seed: int = 0) -> Collection:
    generator = torch.Generator().manual_seed(seed)
    total = sum(lengths)
    keys = torch.randn(KEY_HEADS, total, WIDTH, generator=generator)
    values = torch.randn(KEY_HEADS, total, WIDTH, generator=generator)
    # In two blocks, as folders have segments.
    cut = total // 3
    parts = [(keys[:, :cut], values[:, :cut]), (keys[:, cut:], values[:, cut:])]
    return Collection(lengths, {LAYER: parts})


def make_queries(seed: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(KEY_HEADS * GROUPS, QUERIES, WIDTH, generator=generator)


def weigh_naively(
    queries: torch.Tensor, parts: list[Collection], heads: list[int]
) -> list[list[float]]:
    """Shares of attention of entries, per query, by loops; the sinks' are 0."""
    keys = torch.cat([key for part in parts for key, _ in part.layers[LAYER]], 1)
    is_sink = torch.cat([part.is_sink for part in parts]).tolist()
    sums = [[0.0] * keys.shape[1] for _ in range(QUERIES)]
    for head in heads:
        for query in range(QUERIES):
            scores = [
                -math.inf
                if is_sink[entry]
                else float(queries[head, query] @ keys[head // GROUPS, entry])
                for entry in range(keys.shape[1])
            ]
            total = sum(map(math.exp, scores))
            for entry, score in enumerate(scores):
                sums[query][entry] += math.exp(score) / total / len(heads)
    return sums


@pytest.mark.parametrize("heads", [[0, 1, 2, 3, 4, 5], [4], [1, 5]])
def test_shares_of_attention_are_those_of_loops_over_all_collections(heads):
    parts, queries = [make_collection(), make_collection((37,), seed=2)], make_queries()
    shares = torch.cat(weigh_chunks({LAYER: queries}, {LAYER: torch.tensor(heads)}, parts), 1)
    chunks = torch.cat([parts[0].chunks, parts[1].chunks + len(parts[0].first_of_chunk)])
    wanted = torch.zeros_like(shares)
    wanted.index_add_(1, chunks, torch.tensor(weigh_naively(queries, parts, heads)))
    assert torch.allclose(shares, wanted, atol=1e-6)
    assert shares.sum(1).tolist() == pytest.approx([1.0] * QUERIES, abs=1e-5)


def test_entries_with_tiny_values_are_sinks_and_get_nothing():
    part = make_collection()
    part.layers[LAYER][0][1][:, 5] *= 1e-3
    part.layers[LAYER][1][1][:, 2] *= 1e-3
    sinks = [5, sum(LENGTHS) // 3 + 2]
    assert part.is_sink.nonzero().flatten().tolist() == sinks
    heads = list(range(6))
    (shares,) = weigh_chunks({LAYER: make_queries()}, {LAYER: torch.tensor(heads)}, [part])
    wanted = torch.tensor(weigh_naively(make_queries(), [part], heads))
    assert wanted[:, sinks].tolist() == [[0.0, 0.0]] * QUERIES
    assert torch.allclose(shares, torch.zeros_like(shares).index_add_(1, part.chunks, wanted))


def test_no_chunk_goes_over_the_end_of_a_document():
    part = make_collection()
    first = [0, 32, 64, 71, 72, 104, 136, 168, 200, 202]
    assert part.first_of_chunk.tolist() == [*first[:-1], 202]
    assert part.chunks[[0, 31, 32, 70, 71, 72, 201, 202]].tolist() == [0, 0, 1, 2, 3, 4, 8, 9]


def share_out(part: Collection, weights: dict[int, float]) -> torch.Tensor:
    """Shares of the chunks of a few entries, by every query."""
    shares = torch.zeros(QUERIES, len(part.first_of_chunk))
    for entry, weight in weights.items():
        shares[:, part.chunks[entry]] = weight
    return shares


def test_spans_lie_around_the_best_chunks_inside_their_documents_best_first():
    part = make_collection()
    spans = choose_spans([part], [share_out(part, {141: 0.5, 3: 0.3, 71: 0.2})], 3, 48)
    assert [(one.document, one.start, one.end) for one in spans] == [
        (3, 128, 176),  # the chunk is 136 to 168
        (0, 0, 48),  # moved into the document
        (1, 71, 72),  # a document of one entry
    ]
    assert [one.score for one in spans] == pytest.approx([0.5, 0.3, 0.2])


def test_spans_do_not_overlap_and_what_has_no_share_is_not_chosen():
    part = make_collection()
    spans = choose_spans([part], [share_out(part, {141: 0.5, 169: 0.3, 72: 0.2})], 4, 48)
    # Around the second best chunk, 168 to 200, a span would overlap that of the best.
    assert [(one.start, one.end) for one in spans] == [(128, 176), (72, 120)]


def test_the_best_chunk_of_several_collections_comes_first():
    parts = [make_collection(), make_collection((67,), seed=2)]
    shares = [share_out(parts[0], {10: 0.4}), share_out(parts[1], {40: 0.6})]
    spans = choose_spans(parts, shares, 2, 32)
    assert [(one.collection, one.start, one.end) for one in spans] == [(1, 32, 64), (0, 0, 32)]


def test_nothing_is_found_in_nothing():
    nothing = Collection((), {})
    shares = weigh_chunks({LAYER: make_queries()}, {LAYER: torch.arange(6)}, [nothing])
    assert choose_spans([nothing], shares, 4, 48) == []


def test_what_many_queries_point_to_goes_before_what_one_is_sure_of():
    part = make_collection()
    shares = share_out(part, {10: 0.15})
    shares[0, part.chunks[10]] = 0.0
    shares[0, part.chunks[150]] = 1.0
    first, second = choose_spans([part], [shares], 2, 32)
    assert (first.start, second.start) == (0, 136)
    assert [first.score, second.score] == pytest.approx([0.12, 0.2])
