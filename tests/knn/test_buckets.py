"""Approximate top k against its formula, and where it is exact."""

from __future__ import annotations

import pytest
import torch

from memorizing.index_settings import BucketSettings
from memorizing.knn import StoredKeys, make_index, recall_at_k
from memorizing.knn.buckets import expect_recall
from tests.knn.ring import draw_keys


@pytest.mark.parametrize(
    ("size", "k", "num_buckets", "per_bucket", "recall"),
    [
        # From the papers' formula.
        (65_536, 32, 128, 2, 0.9916),
        (65_536, 32, 256, 2, 0.9978),
        (65_536, 32, 1024, 1, 0.9852),
        # Everything survives.
        (7, 3, 7, 1, 1.0),
        (7, 3, 1, 7, 1.0),
        # One of two buckets of one has the best: by hand, 2 slots in each, k = 2.
        (4, 2, 2, 1, 1 - 1 / 6),
    ],
)
def test_the_expected_recall_is_that_of_the_formula(
    size: int, k: int, num_buckets: int, per_bucket: int, recall: float
) -> None:
    assert expect_recall(size, k, num_buckets, per_bucket) == pytest.approx(recall, abs=5e-5)


@pytest.mark.parametrize(
    ("size", "k", "num_buckets", "per_bucket"),
    [(1000, 32, 512, 1), (1500, 32, 64, 2), (700, 32, 64, 1), (1000, 100, 10, 1)],
)
def test_the_measured_recall_is_near_the_expected(
    size: int, k: int, num_buckets: int, per_bucket: int
) -> None:
    keys, queries = draw_keys(1, 4, size, 29), draw_keys(1, 4, 211, 29, seed=1)
    stored = StoredKeys(keys, (size,))
    index = make_index(BucketSettings(num_buckets=num_buckets, per_bucket=per_bucket))
    measured = recall_at_k(index.search(queries, stored, k), queries, stored)
    assert measured == pytest.approx(expect_recall(size, k, num_buckets, per_bucket), abs=0.02)


def test_as_many_survivors_as_slots_are_exact() -> None:
    keys, queries = draw_keys(2, 3, 211, 17), draw_keys(2, 3, 5, 17, seed=1)
    stored = StoredKeys(keys, (211, 300))
    index = make_index(BucketSettings(num_buckets=31, per_bucket=7))
    assert recall_at_k(index.search(queries, stored, 11), queries, stored) == 1.0
    assert torch.equal(
        index.search(queries, stored, 11).slots.sort(-1).values,
        make_index(BucketSettings(num_buckets=211))
        .search(queries, stored, 11)
        .slots.sort(-1)
        .values,
    )


@pytest.mark.parametrize(("newest", "hidden"), [(320, 308), (325, 306), (310, 300)])
def test_entries_that_share_buckets_are_found_where_all_others_are_hidden(
    newest: int, hidden: int
) -> None:
    size, k = 331, 23
    keys, queries = draw_keys(1, 2, size, 17).bfloat16(), draw_keys(1, 2, 5, 17, seed=1)
    stored = StoredKeys(keys, (size + newest + 1,))
    num_hidden = torch.tensor([[0, hidden, hidden - 1, size - k, size]])
    index = make_index(BucketSettings(num_buckets=29))
    found = index.search(queries, stored, k, num_hidden=num_hidden)
    assert torch.equal(found.valid.sum(-1)[0, 0], (size - num_hidden[0]).clamp(max=k))
