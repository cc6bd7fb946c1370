"""No speed is reported of a search that is wrong in any way."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from memorizing.benchmark.verification import (
    Truth,
    check_exact,
    check_neighbors,
    compute_truth,
    measure_rounding,
)
from memorizing.errors import MemorizingError
from memorizing.knn import Neighbors
from tests.knn.ring import search_exact

NUM_HEADS, NUM_QUERIES, NUM_ENTRIES, HEAD_DIM, K = 2, 67, 101, 13, 5


@pytest.fixture
def truth() -> Truth:
    generator = torch.Generator().manual_seed(0)
    queries = torch.randn(NUM_HEADS, NUM_QUERIES, HEAD_DIM, generator=generator).bfloat16()
    keys = torch.randn(NUM_HEADS, NUM_ENTRIES, HEAD_DIM, generator=generator).bfloat16()
    return compute_truth(queries, keys, K)


@pytest.fixture
def found(truth: Truth) -> Neighbors:
    return search_exact(truth.queries.unsqueeze(0), truth.keys.unsqueeze(0), [NUM_ENTRIES], K)


def sort_all(truth: Truth) -> tuple[Tensor, Tensor]:
    scores = torch.matmul(truth.queries.double(), truth.keys.double().transpose(1, 2))
    return scores.sort(dim=-1, descending=True)


def test_the_truth_is_the_kth_of_a_full_sort(truth: Truth) -> None:
    expected = sort_all(truth)[0][..., K - 1]
    torch.testing.assert_close(truth.kth_scores.double(), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("score", "expected"),
    [(1.0, 2**-7), (0.75, 2**-8), (3.0, 2**-6), (-1.5, 2**-7), (2**-9, 2**-16)],
)
def test_a_rounding_is_the_distance_of_neighboring_numbers(score: float, expected: float) -> None:
    assert float(measure_rounding(torch.tensor([score]), torch.bfloat16)) == expected


def test_what_exact_search_finds_passes(truth: Truth, found: Neighbors) -> None:
    check_neighbors("exact", found, truth)
    check_exact("exact", found.slots[0], truth, torch.bfloat16)
    check_exact("sort", sort_all(truth)[1][..., :K], truth, torch.float32)


def test_one_missed_neighbor_of_one_query_is_noticed(truth: Truth, found: Neighbors) -> None:
    slots = found.slots[0].clone()
    slots[1, 11, 3] = sort_all(truth)[1][1, 11, K + 7]
    with pytest.raises(MemorizingError, match=r"exact returned an entry .* no speed is reported"):
        check_exact("exact", slots, truth, torch.bfloat16)


def test_recall_counts_the_nearest_that_are_found(truth: Truth) -> None:
    slots = sort_all(truth)[1][..., :K].clone()
    assert truth.measure_recall(slots) == 1.0
    slots[0, :, 2] = sort_all(truth)[1][0, :, -1]
    slots[1, 0, 0] = sort_all(truth)[1][1, 0, -1]
    missed = NUM_QUERIES + 1
    expected = 1 - missed / (NUM_HEADS * NUM_QUERIES * K)
    assert truth.measure_recall(slots) == pytest.approx(expected)
    valid = torch.ones_like(slots, dtype=torch.bool)
    valid[1, 1] = False
    assert truth.measure_recall(slots, valid) == pytest.approx(
        expected - K / (NUM_HEADS * NUM_QUERIES * K)
    )


def test_equal_scores_are_no_misses() -> None:
    keys = torch.tensor([[[1.0], [2.0], [2.0], [2.0], [0.5]]]).bfloat16()
    truth = compute_truth(torch.tensor([[[3.0]]]).bfloat16(), keys, 2)
    assert truth.measure_recall(torch.tensor([[[1, 3]]])) == 1.0
    assert truth.measure_recall(torch.tensor([[[1, 0]]])) == 0.5


def change(found: Neighbors, name: str, value: float) -> Neighbors:
    tensors = {part: getattr(found, part).clone() for part in ("slots", "scores", "valid")}
    tensors[name][0, 1, 11, 2] = value
    return Neighbors(**tensors)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("slots", NUM_ENTRIES, "not one of 0 to 100"),
        ("slots", -1, "not one of 0 to 100"),
        ("scores", 1e3, "not that of its slot"),
        ("scores", float("nan"), "not that of its slot"),
    ],
)
def test_a_result_that_is_no_entry_with_its_score_is_noticed(
    truth: Truth, found: Neighbors, name: str, value: float, message: str
) -> None:
    with pytest.raises(MemorizingError, match=message):
        check_neighbors("faiss_ivf", change(found, name, value), truth)


def test_a_slot_that_appears_twice_is_noticed(truth: Truth, found: Neighbors) -> None:
    twice = change(found, "slots", int(found.slots[0, 1, 11, 3]))
    with pytest.raises(MemorizingError, match="the same slot twice"):
        check_neighbors("faiss_ivf", twice, truth)
    with pytest.raises(MemorizingError, match="the same slot twice"):
        check_exact("exact", twice.slots[0], truth, torch.bfloat16)


def test_results_out_of_order_are_noticed(truth: Truth, found: Neighbors) -> None:
    backwards = Neighbors(*(part.flip(-1) for part in (found.slots, found.scores, found.valid)))
    with pytest.raises(MemorizingError, match="not sorted"):
        check_neighbors("faiss_ivf", backwards, truth)


def test_missing_neighbors_may_share_a_slot(truth: Truth, found: Neighbors) -> None:
    valid = found.valid.clone()
    valid[..., 2:] = False
    missing = Neighbors(
        found.slots.masked_fill(~valid, 0), found.scores.masked_fill(~valid, -torch.inf), valid
    )
    check_neighbors("faiss_ivf", missing, truth)
