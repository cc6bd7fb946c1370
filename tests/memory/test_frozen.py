"""Entries in several stores against one memory that holds them all."""

from __future__ import annotations

import sys

import pytest
import torch
from torch import Tensor

from memorizing.errors import IndexUnavailableError, NonFiniteQueryError, StateError
from memorizing.index_settings import parse_index
from memorizing.memory import FrozenMemory, Memory, Retrieved, keep_best
from memorizing.memory.frozen import FrozenBlock, choose_candidates, make_block
from memorizing.model.attention import attend_to_retrieved

ROWS, HEADS, GROUPS, DIM = 2, 3, 5, 11


def make_blocks(keys: Tensor, values: Tensor, sizes: list[int], index: str) -> FrozenMemory:
    blocks = []
    parts = [tensor.split(sizes, dim=1) for tensor in (keys, values)]
    for part_keys, part_values in zip(*parts, strict=True):
        loaded = make_block(
            part_keys.contiguous().unsqueeze(0),
            part_values.contiguous().unsqueeze(0),
            parse_index(index),
        )
        blocks.append(FrozenBlock(part_keys.shape[1], lambda loaded=loaded: loaded))
    return FrozenMemory(HEADS, DIM, blocks)


def make_entries(size: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    return torch.randn(HEADS, size, DIM).to(dtype), torch.randn(HEADS, size, DIM).to(dtype)


def fill_memory(keys: Tensor, values: Tensor, num_rows: int = ROWS) -> Memory:
    memory = Memory(num_rows, HEADS, keys.shape[1], DIM, keys.dtype)
    shape = (num_rows, *keys.shape)
    memory.append(keys.expand(shape), values.expand(shape))
    return memory


def merge_attention(queries: Tensor, parts: tuple[Retrieved, ...]) -> tuple[Tensor, Tensor]:
    """One softmax over all parts, by their log-sum-exp."""
    found = [attend_to_retrieved(queries, part) for part in parts]
    log_sums = torch.stack([log_sum for *_, log_sum in found])
    shares = torch.softmax(log_sums, 0)
    total = sum(
        share.unsqueeze(-1) * output for share, (output, *_) in zip(shares, found, strict=True)
    )
    assert isinstance(total, Tensor)
    return total, log_sums.logsumexp(0)


@pytest.mark.parametrize("sizes", [[61], [23, 1, 37], [2, 59]])
@pytest.mark.parametrize("k", [1, 7, 61, 67])
def test_blocks_are_attended_to_as_one_memory(sizes: list[int], k: int) -> None:
    keys, values = make_entries(61, torch.float64)
    frozen, memory = make_blocks(keys, values, sizes, "exact"), fill_memory(keys, values)
    weight = torch.randn(ROWS, HEADS * GROUPS, 13, DIM, dtype=torch.float64)
    grads, outputs = [], []
    for search in (
        lambda queries: frozen.retrieve(queries, k),
        lambda queries: (memory.retrieve(queries, k),),
    ):
        generator = torch.Generator().manual_seed(1)
        queries = torch.randn(weight.shape, generator=generator, dtype=torch.float64)
        queries.requires_grad_()
        output, log_sum = merge_attention(queries, search(queries))
        ((output * weight).sum() + log_sum.sum()).backward()
        outputs.append((output, log_sum))
        grads.append(queries.grad)
    torch.testing.assert_close(outputs[0], outputs[1])
    torch.testing.assert_close(grads[0], grads[1])


@pytest.mark.parametrize("num_tail", [1, 3, 29])
def test_a_base_and_a_tail_are_attended_to_as_one_memory(num_tail: int) -> None:
    keys, values = make_entries(61)
    base = make_blocks(keys, values, [23, 38], "exact")
    torch.manual_seed(2)
    tails = torch.randn(2, ROWS, HEADS, num_tail, DIM)
    tail = Memory(ROWS, HEADS, 31, DIM, torch.float32)
    tail.append(*tails)
    whole = Memory(ROWS, HEADS, 97, DIM, torch.float32)
    whole.append(keys.expand(ROWS, -1, -1, -1), values.expand(ROWS, -1, -1, -1))
    whole.append(*tails)
    queries = torch.randn(ROWS, HEADS, 13, DIM)
    parts = keep_best([*base.retrieve(queries, 7), tail.retrieve(queries, 7)], 7)
    counts = torch.stack([part.neighbors.valid.sum(-1) for part in parts]).sum(0)
    assert bool((counts == 7).all())
    expected = merge_attention(queries, (whole.retrieve(queries, 7),))
    torch.testing.assert_close(merge_attention(queries, parts), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_over_all_parts_exactly_the_best_are_valid(dtype: torch.dtype) -> None:
    keys, values = make_entries(61, dtype)
    # Small integers: many scores are equal.
    keys = (keys * 2).round()
    frozen = make_blocks(keys, values, [2, 29, 30], "exact")
    queries = torch.randn(ROWS, HEADS, 7, DIM).mul(2).round()
    for k in (1, 5, 59, 60, 61, 67):
        parts = frozen.retrieve(queries, k)
        kept = torch.cat([part.neighbors.scores for part in parts], -1).sort(-1).values
        expected = queries.to(dtype) @ keys.transpose(1, 2)
        count = min(k, 61)
        assert torch.equal(kept[..., -count:], expected.sort(-1).values[..., -count:])
        assert (
            sum(int(part.neighbors.valid.sum()) for part in parts)
            == queries[..., 0].numel() * count
        )
        for part in parts:
            valid = part.neighbors.valid
            assert torch.equal(part.neighbors.scores > -torch.inf, valid)
            assert not part.neighbors.slots[~valid].any()
            found = (queries.to(dtype).unsqueeze(-2) * part.fetch_keys()).sum(-1)
            torch.testing.assert_close(found[valid], part.neighbors.scores[valid])


def test_of_equal_scores_the_newest_wins() -> None:
    keys = torch.ones(1, 13, 3)
    values = torch.arange(13.0).view(1, 13, 1).expand(1, 13, 3).contiguous()
    parts = []
    for start, stop in ((0, 5), (5, 8), (8, 13)):
        block = FrozenMemory.from_tensors(keys[:, start:stop], values[:, start:stop])
        parts += block.retrieve(torch.ones(1, 1, 2, 3), 7)
    kept = [
        part.fetch_values()[part.neighbors.valid][:, 0].tolist() for part in keep_best(parts, 7)
    ]
    assert kept == [[], [7, 6, 7, 6], [12, 11, 10, 9, 8] * 2]


def test_closed_rows_find_nothing_and_groups_share_a_head() -> None:
    keys, values = make_entries(41)
    frozen, memory = make_blocks(keys, values, [17, 24], "exact"), fill_memory(keys, values, 3)
    queries = torch.randn(3, HEADS * GROUPS, 7, DIM)
    is_open = torch.tensor([True, False, True])
    parts = frozen.retrieve(queries, 5, is_open)
    expected = memory.retrieve(queries, 5, is_open=is_open)
    torch.testing.assert_close(
        merge_attention(queries, parts)[0][is_open],
        attend_to_retrieved(queries, expected)[0][is_open],
    )
    assert not any(part.neighbors.valid[1].any() for part in parts)
    closed = frozen.retrieve(queries, 5, torch.zeros(3, dtype=torch.bool))
    assert not any(part.neighbors.valid.any() for part in closed)
    attend_to_retrieved(queries, closed[0])


def test_queries_that_do_not_fit_are_refused() -> None:
    frozen = FrozenMemory.from_tensors(*make_entries(7))
    for shape in ((1, 2, 5, DIM), (1, HEADS, 5, DIM + 1), (HEADS, 5, DIM), (1, 0, 5, DIM)):
        with pytest.raises(StateError, match="or a multiple"):
            frozen.retrieve(torch.zeros(shape), 3)
    queries = torch.zeros(2, 2 * HEADS, 5, DIM)
    queries[1, 4, 3, 2] = torch.nan
    with pytest.raises(NonFiniteQueryError, match="query 3 of row 1, head 4"):
        frozen.retrieve(queries, 3)
    with pytest.raises(StateError, match="both must be"):
        FrozenMemory.from_tensors(torch.zeros(3, 7, DIM), torch.zeros(3, 5, DIM))


def test_a_memory_without_entries_finds_nothing() -> None:
    frozen = FrozenMemory.from_tensors(*make_entries(0))
    assert frozen.size == 0
    assert frozen.retrieve(torch.zeros(1, HEADS, 5, DIM), 3) == ()
    assert keep_best((), 3) == ()


@pytest.mark.parametrize("index", ["int8", "faiss_flat:block_len=13", "faiss_hnsw:block_len=13"])
def test_every_index_searches_frozen_blocks(index: str) -> None:
    if index.startswith("faiss"):
        pytest.importorskip("faiss")
    keys, values = make_entries(61)
    exact = make_blocks(keys, values, [7, 54], "exact")
    frozen = make_blocks(keys, values, [7, 54], index)
    queries = torch.randn(ROWS, HEADS, 5, DIM)
    for part, expected in zip(frozen.retrieve(queries, 3), exact.retrieve(queries, 3), strict=True):
        assert torch.equal(part.neighbors.slots, expected.neighbors.slots)


BLOCKS = ["faiss_ivf:num_lists=2,num_probes=2", "faiss_hnsw", "faiss_fp16", "scann"]


@pytest.mark.parametrize("index", BLOCKS)
@pytest.mark.parametrize("k", [1, 7, 61])
def test_of_several_blocks_with_an_index_the_nearest_of_all_are_found(index: str, k: int) -> None:
    pytest.importorskip("faiss" if index.startswith("faiss") else "scann")
    index = f"{index}{',' if ':' in index else ':'}block_len=13,oversample=2"
    keys, values = make_entries(241)
    sizes = [83, 79, 79]
    exact, frozen = (
        make_blocks(keys, values, sizes, "exact"),
        make_blocks(keys, values, sizes, index),
    )
    queries = torch.randn(3, HEADS * GROUPS, 5, DIM)
    is_open = torch.tensor([True, False, True])
    found, expected = (memory.retrieve(queries, k, is_open) for memory in (frozen, exact))
    assert choose_candidates([one.load() for one in frozen.blocks], queries[:1], k) is not None
    for output, right in zip(
        merge_attention(queries, found), merge_attention(queries, expected), strict=True
    ):
        torch.testing.assert_close(output[is_open], right[is_open])
    assert not any(part.neighbors.valid[1].any() for part in found)
    for nothing in (queries[:, :, :0], queries):
        closed = frozen.retrieve(nothing, k, torch.zeros(3, dtype=torch.bool))
        assert not any(part.neighbors.valid.any() for part in closed)


def test_of_all_that_blocks_propose_only_the_best_are_scored() -> None:
    pytest.importorskip("faiss")
    keys, values = make_entries(241)
    frozen = make_blocks(keys, values, [83, 79, 79], "faiss_flat:block_len=13,oversample=2")
    queries = torch.randn(1, HEADS, 5, DIM)
    chosen = choose_candidates([one.load() for one in frozen.blocks], queries, 7)
    assert chosen is not None
    assert bool((sum((part >= 0).sum(-1) for part in chosen) == 14).all())
    best = torch.einsum("htd,hnd->htn", queries[0], keys).topk(14).indices.sort(-1).values
    numbers = [
        (part + first).masked_fill(part < 0, -1)
        for part, first in zip(chosen, frozen.first_entries, strict=True)
    ]
    assert torch.equal(torch.cat(numbers, -1).sort(-1).values[..., -14:], best)


def test_a_query_that_blocks_offer_too_little_finds_as_many_as_it_asks_for() -> None:
    pytest.importorskip("faiss")
    keys, values = make_entries(162)
    frozen = make_blocks(keys, values, [83, 79], "faiss_ivf:block_len=13,num_lists=2,num_probes=1")
    queries = torch.randn(1, HEADS, 5, DIM)
    assert choose_candidates([one.load() for one in frozen.blocks], queries, 151) is None
    found = frozen.retrieve(queries, 151)
    assert bool((sum(part.neighbors.valid.sum(-1) for part in found) == 151).all())
    expected = make_blocks(keys, values, [83, 79], "exact").retrieve(queries, 151)
    torch.testing.assert_close(
        merge_attention(queries, found)[0], merge_attention(queries, expected)[0]
    )


def test_what_was_loaded_in_inference_mode_can_be_learned_from_later() -> None:
    keys, values = make_entries(41)
    with torch.inference_mode():
        frozen = FrozenMemory.from_tensors(keys, values)
        frozen.retrieve(torch.zeros(1, HEADS, 2, DIM), 3)
    queries = torch.randn(ROWS, HEADS, 5, DIM, requires_grad=True)
    (found,) = frozen.retrieve(queries, 7)
    attend_to_retrieved(queries, found)[0].sum().backward()
    assert queries.grad is not None
    assert bool(queries.grad.any())


def test_an_index_whose_package_is_missing_is_refused_at_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(IndexUnavailableError, match="faiss"):
        FrozenMemory.from_tensors(*make_entries(7), parse_index("faiss_hnsw"))
