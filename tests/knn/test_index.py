"""Exact search against a full sort."""

from __future__ import annotations

import math

import pytest
import torch

from tests.knn.ring import search_exact


def make(
    rows: int, heads: int, queries: int, slots: int, dim: int, dtype: torch.dtype, seed: int = 0
):
    generator = torch.Generator().manual_seed(seed)
    q = torch.randn(rows, heads, queries, dim, generator=generator).to(dtype)
    return q, torch.randn(rows, heads, slots, dim, generator=generator).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [1, 2, 12, 13, 14, 53, 541, 4099])
def test_every_score_is_at_least_the_kth_true_score(dtype: torch.dtype, size: int) -> None:
    queries, keys = make(2, 3, 5, 4099, 11, dtype)
    found = search_exact(queries, keys, [size, size], 13)
    k = min(13, size)
    true = queries.float() @ keys[:, :, :size].float().transpose(-1, -2)
    best = true.sort(-1, descending=True).values[..., :k]
    picked = true.gather(-1, found.slots[..., :k])
    assert (picked >= best[..., -1:] - 1e-5).all()
    torch.testing.assert_close(
        picked, found.scores[..., :k].float(), rtol=2 * torch.finfo(dtype).eps, atol=1e-5
    )
    assert (found.slots[..., :k].sort(-1).values.diff() > 0).all() or k == 1
    assert found.valid.sum(-1).eq(k).all()
    assert torch.isneginf(found.scores[..., k:]).all()


def test_missing_entries_are_invalid_and_stale_slots_are_never_found() -> None:
    queries, keys = make(3, 2, 5, 31, 7, torch.float32)
    keys[1, :, 4:] = math.nan
    keys[2] = math.nan
    found = search_exact(queries, keys, [31, 4, 0], 7)
    assert found.valid.sum(-1)[:, 0, 0].tolist() == [7, 4, 0]
    assert (found.slots[1] < 4).all()
    assert not torch.isnan(found.scores).any()


def test_no_query_finds_nothing() -> None:
    queries, keys = make(2, 3, 0, 31, 7, torch.bfloat16)
    assert search_exact(queries, keys, [31, 4], 5).slots.shape == (2, 3, 0, 5)


def test_equal_scores_are_ordered_newest_first() -> None:
    queries = torch.ones(1, 1, 1, 2)
    keys = torch.ones(1, 1, 7, 2)
    # The newest slot is 2, so the order of age is 2, 1, 0, 6, 5, 4, 3.
    found = search_exact(queries, keys, [10], 5)
    assert found.slots.flatten().tolist() == [2, 1, 0, 6, 5]


def test_permuting_the_slots_changes_nothing() -> None:
    torch.manual_seed(0)
    queries = torch.randint(-2, 3, (1, 2, 5, 3)).float()
    keys = torch.randint(-2, 3, (1, 2, 37, 3)).float()
    straight = search_exact(queries, keys, [37], 11)
    turned = search_exact(queries, keys.roll(9, dims=2), [46], 11)
    assert torch.equal((turned.slots - 9) % 37, straight.slots)
    assert torch.equal(turned.scores, straight.scores)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_newest_entries_can_be_hidden_from_each_query(dtype: torch.dtype) -> None:
    queries, keys = make(2, 3, 5, 211, 7, dtype)
    num_hidden = torch.tensor([[0, 1, 30, 210, 211], [5, 5, 5, 5, 5]])
    newest = [17, 210]
    found = search_exact(queries, keys, [229, 211], 3, num_hidden)
    for row in range(2):
        age = (newest[row] - found.slots[row]) % 211
        for query in range(5):
            valid = found.valid[row, :, query]
            assert (age[:, query][valid] >= num_hidden[row, query]).all()
            assert valid.sum(-1).eq(min(3, 211 - int(num_hidden[row, query]))).all()
