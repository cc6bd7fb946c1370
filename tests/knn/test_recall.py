"""Recall by score."""

from __future__ import annotations

import pytest
import torch

from memorizing.index_settings import parse_index
from memorizing.knn import Neighbors, StoredKeys, make_index, recall_at_k
from tests.knn.ring import draw_keys

QUERIES = torch.tensor([1.0, 0.0]).view(1, 1, 1, 2)
KEYS = torch.tensor([[0.9, 0], [0.7, 0], [0.5, 0], [0.3, 0], [0.7, 5]]).view(1, 1, 5, 2)


def measure(slots: list[int], num_valid: int | None = None, **options) -> float:
    found = torch.tensor(slots).view(1, 1, 1, -1)
    valid = (torch.arange(len(slots)) < (len(slots) if num_valid is None else num_valid)).view(
        found.shape
    )
    stored = StoredKeys(KEYS, (options.pop("num_appended", 5),))
    return recall_at_k(Neighbors(found, found.float(), valid), QUERIES, stored, **options)


@pytest.mark.parametrize(
    ("slots", "recall"),
    [
        ([0, 1], 1.0),
        ([0, 4], 1.0),  # the second best score as well
        ([0, 2], 0.5),
        ([2, 3], 0.0),
        ([0, 0], 0.5),  # once each
        ([0, 1, 4], 1.0),
        ([0, 1, 2], 2 / 3),
    ],
)
def test_entries_count_by_their_score_and_once(slots: list[int], recall: float):
    assert measure(slots) == pytest.approx(recall)


def test_what_is_not_valid_does_not_count():
    assert measure([0, 1], num_valid=1) == 0.5


def test_hidden_entries_are_neither_wanted_nor_counted():
    # Slots 4 and 3 are the newest.
    hidden = torch.tensor([[2]])
    assert measure([0, 1], num_hidden=hidden) == 1.0
    assert measure([0, 4], num_hidden=hidden) == 0.5
    assert measure([0, 1, 2, 0], num_hidden=hidden) == 1.0


def test_slots_that_were_never_written_do_not_count():
    assert measure([0, 4], num_appended=2) == 0.5


def test_where_nothing_can_be_found_nothing_is_missed():
    assert measure([0, 1], num_valid=0, num_appended=0) == 1.0
    assert measure([0, 1], num_valid=0, key_rows=[None]) == 1.0


def search_with(index: str, dtype: torch.dtype) -> float:
    keys = draw_keys(2, 3, 2111, 17).to(dtype)
    queries = draw_keys(2, 3, 53, 17, seed=1)
    stored = StoredKeys(keys, (5000, 97))
    return recall_at_k(make_index(parse_index(index)).search(queries, stored, 7), queries, stored)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_exact_search_misses_nothing_whatever_the_dtype(dtype: torch.dtype):
    assert search_with("exact", dtype) == 1.0
