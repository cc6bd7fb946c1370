"""The selection that accelerators use, against the full sort."""

import math

import pytest
import torch

from memorizing.knn.plain import _choose_bucket_len, _select_newest_first, sort_newest_first


@pytest.mark.parametrize("num_values", [3, 40, 10**6])  # many ties, some, none
@pytest.mark.parametrize(
    ("size", "k", "newest"), [(1000, 8, 999), (777, 8, 100), (20, 20, 3), (9, 8, 8)]
)
def test_equal_scores_are_newest_first_without_sorting_all(size, k, newest, num_values):
    generator = torch.Generator().manual_seed(size)
    bucket_len = _choose_bucket_len(size, k)
    width = -(-size // bucket_len) * bucket_len
    scores = torch.randint(num_values, (2, 30, width), generator=generator).float() - 1
    scores[..., size:] = -math.inf
    scores[1, :5, : size - k // 2] = -math.inf  # these queries see fewer than k
    expected, expected_slots = sort_newest_first(scores[..., :size], k, newest)
    best, slots = _select_newest_first(scores, size, k, newest)
    assert torch.equal(best, expected)
    seen = expected > -math.inf
    assert torch.equal(slots[seen], expected_slots[seen])
