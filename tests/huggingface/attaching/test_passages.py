"""Which passages are found: chunks by their share of attention, spans around the best ones."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch

from memorizing.huggingface.attaching import passages
from memorizing.huggingface.attaching.passages import (
    CHUNK_LEN,
    Collection,
    score_chunks,
)
from memorizing.index_settings import parse_index
from memorizing.memory.frozen import FrozenBlock, FrozenMemory, make_block
from tests.huggingface.attaching.chunks import (
    choose_spans,
    match,
    rank_chunks,
    weigh_chunks,
)

LAYER, KEY_HEADS, GROUPS, QUERIES, WIDTH = 3, 2, 3, 5, 7
LENGTHS = (71, 1, 0, 130, CHUNK_LEN)


def make_collection(
    lengths: tuple[int, ...] = LENGTHS, seed: int = 0, index: str = "exact", sinks: tuple = ()
) -> Collection:
    generator = torch.Generator().manual_seed(seed)
    total = sum(lengths)
    keys = torch.randn(KEY_HEADS, total, WIDTH, generator=generator)
    values = torch.randn(KEY_HEADS, total, WIDTH, generator=generator)
    values[:, list(sinks)] *= 1e-3
    # In two blocks, as folders have segments.
    blocks = []
    for span in (slice(0, sum(lengths[:2])), slice(sum(lengths[:2]), None)):
        part = keys[:, span].unsqueeze(0), values[:, span].unsqueeze(0)
        load = partial(make_block, *(one.contiguous() for one in part), parse_index(index))
        blocks.append(FrozenBlock(part[0].shape[2], load))
    return Collection(lengths, {LAYER: FrozenMemory(KEY_HEADS, WIDTH, blocks)})


def make_queries(seed: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(KEY_HEADS * GROUPS, QUERIES, WIDTH, generator=generator)


def find_chunk(part: Collection, entry: int) -> int:
    return int((part.first_of_chunk <= entry).sum()) - 1


def weigh_naively(
    queries: torch.Tensor, parts: list[Collection], heads: list[int]
) -> list[torch.Tensor]:
    """Shares of attention of chunks, per query, by loops over entries; the sinks' are 0."""
    blocks = [block.load() for part in parts for block in part.layers[LAYER].blocks]
    keys = torch.cat([block.keys[0] for block in blocks], 1)
    is_sink = torch.cat([part.is_sink for part in parts]).tolist()
    chunks = [(part, entry) for part in parts for entry in range(sum(part.num_entries))]
    shares = [torch.zeros(QUERIES, len(part.first_of_chunk)) for part in parts]
    for head in heads:
        for query in range(QUERIES):
            scores = [
                -math.inf
                if is_sink[entry]
                else float(queries[head, query] @ keys[head // GROUPS, entry])
                for entry in range(keys.shape[1])
            ]
            total = sum(map(math.exp, scores))
            for (part, entry), score in zip(chunks, scores, strict=True):
                share = math.exp(score) / total / len(heads)
                shares[parts.index(part)][query, find_chunk(part, entry)] += share
    return shares


def weigh(parts: list[Collection], heads: list[int], num_neighbors: int = 1) -> list[torch.Tensor]:
    queries, places = {LAYER: make_queries()}, {LAYER: torch.tensor(heads)}
    return weigh_chunks(queries, places, parts, num_neighbors)


@pytest.mark.parametrize("heads", [[0, 1, 2, 3, 4, 5], [4], [1, 5]])
@pytest.mark.parametrize("tile", [1, 2, 256])
def test_shares_of_chunks_are_those_of_loops_over_all_collections(heads, tile, monkeypatch):
    monkeypatch.setattr(passages, "_TILE", tile)
    parts = [make_collection(sinks=(3, 73, 109)), make_collection((37,), seed=2)]
    shares = weigh(parts, heads)
    for found, expected in zip(shares, weigh_naively(make_queries(), parts, heads), strict=True):
        assert torch.allclose(found, expected, atol=1e-6)
    assert torch.cat(shares, 1).sum(1).tolist() == pytest.approx([1.0] * QUERIES, abs=1e-5)


@pytest.mark.parametrize("heads", [[0, 1, 2, 3, 4, 5], [1, 5]])
def test_an_index_that_finds_every_entry_gives_the_shares_of_exact_search(heads):
    parts = [make_collection(sinks=(3, 109), index="int8"), make_collection((37,), seed=2)]
    shares = weigh(parts, heads, num_neighbors=sum(LENGTHS))
    for found, expected in zip(shares, weigh_naively(make_queries(), parts, heads), strict=True):
        assert torch.allclose(found, expected, atol=1e-6)


def test_of_what_an_index_searches_the_nearest_entries_share_all_attention():
    part = make_collection(index="int8")
    (shares,) = weigh([part], [4], num_neighbors=1)
    wanted, first = torch.zeros_like(shares), 0
    queries, found = make_queries()[4], []
    for block in part.layers[LAYER].blocks:
        best = (queries @ block.load().keys[0, 4 // GROUPS].t()).max(1)
        found.append((best.values, best.indices + first))
        first += block.num_entries
    for query in range(QUERIES):
        weight = torch.stack([scores[query] for scores, _ in found]).softmax(0)
        for share, (_, entries) in zip(weight, found, strict=True):
            wanted[query, find_chunk(part, int(entries[query]))] += share
    assert torch.allclose(shares, wanted, atol=1e-6)


def test_scores_far_apart_neither_overflow_nor_vanish():
    part = make_collection()
    queries = make_queries() * 300.0
    (shares,) = weigh_chunks({LAYER: queries}, {LAYER: torch.arange(6)}, [part], 1)
    assert shares.sum(1).tolist() == pytest.approx([1.0] * QUERIES, abs=1e-5)
    keys = torch.cat([block.load().keys[0] for block in part.layers[LAYER].blocks], 1)
    best = (queries @ keys[torch.arange(6) // GROUPS].mT).argmax(2)
    wanted = torch.zeros_like(shares)
    for head, query in itertools.product(range(6), range(QUERIES)):
        wanted[query, find_chunk(part, int(best[head, query]))] += 1 / 6
    assert torch.allclose(shares, wanted, atol=0.02)


def test_entries_with_tiny_values_are_sinks_and_get_nothing():
    part = make_collection(sinks=(5, 71))
    assert part.is_sink.nonzero().flatten().tolist() == [5, 71]
    (shares,) = weigh([part], list(range(6)))
    # The document of one entry is a sink and nothing else.
    assert shares[:, 3].tolist() == [0.0] * QUERIES
    assert shares.sum(1).tolist() == pytest.approx([1.0] * QUERIES, abs=1e-5)


def test_no_chunk_goes_over_the_end_of_a_document():
    first = [0, 32, 64, 71, 72, 104, 136, 168, 200, 202]
    part = make_collection()
    assert part.first_of_chunk.tolist() == first
    entries = torch.tensor([[0, 31, 32, 70], [71, 72, 201, 233]])
    assert part.find_chunks(entries).tolist() == [[0, 0, 1, 2], [3, 4, 8, 9]]
    assert Collection((), {}).first_of_chunk.tolist() == []


def share_out(part: Collection, weights: dict[int, float]) -> torch.Tensor:
    """Shares of the chunks of a few entries, by every query."""
    shares = torch.zeros(QUERIES, len(part.first_of_chunk))
    for entry, weight in weights.items():
        shares[:, find_chunk(part, entry)] = weight
    return shares


def choose(
    parts: list[Collection],
    shares: list[torch.Tensor],
    count: int,
    length: int,
    margin: float = 20.0,
) -> list:
    """By shares alone."""
    nothing = [torch.zeros(4, share.shape[1]) for share in shares]
    return choose_spans(parts, shares, rank_chunks(shares, nothing), count, length, margin)


def test_spans_lie_around_the_best_chunks_inside_their_documents_best_first():
    part = make_collection()
    spans = choose([part], [share_out(part, {141: 0.5, 3: 0.3, 71: 0.2})], 3, 48)
    assert [(one.document, one.start, one.end) for one in spans] == [
        (3, 124, 172),  # the chunk is 136 to 168: a quarter stands before it
        (0, 0, 48),  # moved into the document
        (1, 71, 72),  # a document of one entry
    ]
    assert [one.score for one in spans] == pytest.approx([0.5, 0.3, 0.2])


def test_a_text_that_is_written_on_needs_nothing_before_the_chunk():
    part = make_collection()
    shares = [share_out(part, {141: 0.5, 201: 0.3})]
    nothing = [torch.zeros(4, len(part.first_of_chunk))]
    spans = choose_spans([part], shares, rank_chunks(shares, nothing), 2, 32, 20.0, is_written=True)
    assert [(one.start, one.end) for one in spans] == [(136, 168), (170, 202)]


def test_spans_do_not_overlap_and_what_has_no_share_is_not_chosen():
    part = make_collection()
    spans = choose([part], [share_out(part, {141: 0.5, 169: 0.3, 72: 0.2})], 4, 48)
    # Around the second best chunk, 168 to 200, a span would overlap that of the best.
    assert [(one.start, one.end) for one in spans] == [(124, 172), (72, 120)]


@pytest.mark.parametrize(("margin", "count"), [(0.0, 1), (0.6, 1), (0.8, 2), (3.0, 2), (3.3, 3)])
def test_chunks_that_score_much_lower_than_the_best_are_not_chosen(margin: float, count: int):
    part = make_collection()
    # Logarithms of the shares lie 0.69 and 3.2 below that of the best.
    shares = share_out(part, {141: 0.5, 3: 0.25, 71: 0.02})
    spans = choose([part], [shares], 3, 32, margin)
    assert [one.document for one in spans] == [3, 0, 1][:count]


def test_the_best_chunk_of_several_collections_comes_first():
    parts = [make_collection(), make_collection((67,), seed=2)]
    shares = [share_out(parts[0], {10: 0.4}), share_out(parts[1], {40: 0.6})]
    spans = choose(parts, shares, 2, 32)
    assert [(one.collection, one.start, one.end) for one in spans] == [(1, 24, 56), (0, 0, 32)]


def test_nothing_is_found_in_nothing():
    nothing = Collection((), {})
    assert choose([nothing], weigh([nothing], list(range(6))), 4, 48) == []


def test_what_many_queries_point_to_goes_before_what_one_is_sure_of():
    part = make_collection()
    shares = share_out(part, {10: 0.15})
    shares[0, find_chunk(part, 10)] = 0.0
    shares[0, find_chunk(part, 150)] = 1.0
    first, second = choose([part], [shares], 2, 32)
    assert (first.start, second.start) == (0, 128)
    assert [first.score, second.score] == pytest.approx([0.12, 0.2])


def with_ids(part: Collection, ids: torch.Tensor) -> Collection:
    return replace(part, read_ids=lambda: ids)


def list_next(part: Collection) -> list[list[int]]:
    """Per chunk, its number and that of the next one of its document, if any."""
    documents = [part.find_document(first) for first in part.first_of_chunk.tolist()]
    return [
        [number, number + 1][: 1 + (documents[number : number + 2] == [document] * 2)]
        for number, document in enumerate(documents)
    ]


@pytest.mark.parametrize("lengths", [LENGTHS, (0,), (), (64,), (65, 1), (0, 32, 0, 33)])
def test_a_chunk_is_joined_with_the_next_of_its_document(lengths):
    part = make_collection(lengths) if len(lengths) > 2 else Collection(lengths, {})
    values = torch.rand(3, len(part.first_of_chunk))
    wanted = [[sum(line[n] for n in pair) for pair in list_next(part)] for line in values.tolist()]
    assert part.join_next(values).tolist() == [pytest.approx(line) for line in wanted]


def list_ends(tokens: list[int]) -> list[list[Any]]:
    """Per token, the words that end with it: it, and it with the one before; not unknown ones."""
    return [
        [token] * (token >= 0) + [(before, token)] * (min(before, token) >= 0)
        for before, token in zip([-1, *tokens], tokens, strict=False)
    ]


def match_naively(asked: list[int], parts: list[Collection]) -> list[torch.Tensor]:
    """BM25 with k1 = 1.2 and b = 0, by loops over words and chunks; then with near words first.

    Then both of every chunk with the next.
    """
    chunks = []
    for part in parts:
        lists: list[list[Any]] = [[] for _ in part.first_of_chunk]
        for first, after in itertools.pairwise(part.first_entries):
            for entry, words in enumerate(list_ends(part.ids[first:after].tolist()), first):
                lists[find_chunk(part, entry)] += words
        chunks.append(lists)
    all_chunks = [chunk for lists in chunks for chunk in lists]
    scores = [torch.zeros(4, len(lists)) for lists in chunks]
    said = list_ends(asked)[::-1]
    for word in set(itertools.chain(*said)):
        df = sum(word in chunk for chunk in all_chunks)
        idf = math.log(1 + (len(all_chunks) - df + 0.5) / (df + 0.5))
        distance = next(number for number, words in enumerate(said) if word in words)
        for part, score, lists in zip(parts, scores, chunks, strict=True):
            for number, pair in enumerate(list_next(part)):
                for line, numbers in ((0, [number]), (2, pair)):
                    tf = sum(lists[one].count(word) for one in numbers)
                    odds = idf * tf * 2.2 / (tf + 1.2)
                    score[line, number] += odds
                    score[line + 1, number] += odds / (1 + distance / 4)
    return scores


def test_words_are_matched_as_bm25_does_over_the_chunks_of_all_collections():
    generator = torch.Generator().manual_seed(3)
    parts = [
        with_ids(one, torch.randint(9, (sum(one.num_entries),), generator=generator))
        for one in (make_collection(sinks=(3, 73)), make_collection((37,), seed=2))
    ]
    parts[0].read_ids()[5] = -1  # type: ignore[misc]
    parts.append(Collection((), {}))
    for words in ([4, 4, -1, 12, 0], [2], [-1], [], [90]):
        found = match(torch.tensor(words, dtype=torch.int64), parts)
        for one, expected in zip(found, match_naively(words, parts), strict=True):
            assert torch.allclose(one, expected, atol=1e-5)


def test_words_of_sinks_are_matched_and_unknown_tokens_are_none():
    part = with_ids(make_collection(sinks=(40,)), torch.arange(sum(LENGTHS)))
    (found,) = match(torch.tensor([40]), [part])
    assert found.nonzero().tolist() == [[0, 1], [1, 1], [2, 0], [2, 1], [3, 0], [3, 1]]
    ids = torch.arange(sum(LENGTHS))
    ids[40] = -1
    assert not match(torch.tensor([40]), [with_ids(make_collection(), ids)])[0].any()
    assert not match(torch.tensor([4]), [make_collection()])[0].any()


def test_what_heads_and_words_say_is_added_up_over_all_collections():
    parts = [make_collection(), make_collection((37,), seed=2)]
    shares = weigh(parts, list(range(6)))
    generator = torch.Generator().manual_seed(4)
    matches = [torch.rand(4, len(part.first_of_chunk), generator=generator) for part in parts]
    odds = torch.cat(matches, 1).exp()
    told = sum(one / one.sum() for one in odds) / 4
    expected = torch.cat([score_chunks(share) for share in shares]) + (told + 0.001).log()
    assert torch.allclose(torch.cat(rank_chunks(shares, matches)), expected, atol=1e-5)


def test_a_text_finds_what_it_is_about_and_what_it_names_last():
    # Of six chunks, one has three words of the text, and another the name that it ends with.
    lengths = (96, 96)
    ids = torch.arange(192) % 8 + 50
    ids[32:64] = torch.arange(32)
    ids[170] = 40
    part = with_ids(make_collection(lengths), ids)
    words = torch.tensor([0, 1, 2, *range(60, 80), 40])
    shares = torch.zeros(QUERIES, len(part.first_of_chunk))
    spans = choose_spans([part], [shares], rank_chunks([shares], match(words, [part])), 2, 32, 2.0)
    assert [(one.document, one.start) for one in spans] == [(0, 24), (1, 152)]


def test_a_name_of_several_tokens_is_found_where_they_stand_side_by_side():
    ids = torch.full((192,), 50)
    ids[[10, 20, 12, 22]] = torch.tensor([7, 8, 7, 8])
    ids[100:102] = torch.tensor([7, 8])
    part = with_ids(make_collection((96, 96)), ids)
    (found,) = match(torch.tensor([7, 8]), [part])
    assert found.argmax(1).tolist() == [3] * 4
    assert (found[:, 0] > 0).all()


def test_what_stands_on_both_sides_of_the_end_of_a_chunk_is_found_before_a_part_of_it():
    ids = torch.full((192,), 50)
    ids[60:68] = torch.arange(8)  # four words end one chunk, four begin the next
    ids[130:136] = torch.arange(6)
    part = with_ids(make_collection((96, 96)), ids)
    shares = torch.zeros(QUERIES, 6)
    (found,) = match(torch.arange(8), [part])
    spans = choose_spans([part], [shares], rank_chunks([shares], [found]), 1, 64, 2.0)
    assert [(one.document, one.start) for one in spans] == [(0, 16)]


def test_words_decide_where_heads_are_unsure_and_find_what_heads_do_not():
    part = make_collection()
    shares = share_out(part, {10: 0.3, 150: 0.3})
    said = torch.zeros(4, len(part.first_of_chunk))
    said[:, find_chunk(part, 150)], said[:, find_chunk(part, 201)] = 9.0, 3.0
    spans = choose_spans([part], [shares], rank_chunks([shares], [said]), 4, 32, 20.0)
    # To the chunk of 201 no head gives anything; to the others neither heads nor words.
    assert [one.start for one in spans] == [128, 0, 200 - 30]
    assert [one.score for one in spans] == pytest.approx([0.3, 0.3, 0.0])
