"""Attention over retrieved entries and the two ways to combine, by hand."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch

from memorizing.errors import StateError
from memorizing.memory import Memory
from memorizing.model.memory_attention import (
    attend_to_copies,
    attend_to_retrieved,
    combine_by_gate,
    combine_jointly,
)


def test_one_query_by_hand() -> None:
    # Scores ln 3 and 0: weights 3/4 and 1/4.
    query = torch.tensor([[[[math.log(3.0), 5.0]]]])
    memory = Memory(1, 1, 2, 2, torch.float32)
    memory.append(torch.tensor([[[[1.0, 0.0], [0.0, 0.0]]]]), torch.tensor([[[[4.0, 0], [0, 8]]]]))
    output, weights, log_sum = attend_to_retrieved(query, memory.retrieve(query, 2))
    torch.testing.assert_close(weights.flatten(), torch.tensor([0.75, 0.25]))
    torch.testing.assert_close(output.flatten(), torch.tensor([3.0, 2.0]))
    torch.testing.assert_close(log_sum.flatten(), torch.tensor([math.log(4.0)]))


def fill_memory(dtype: torch.dtype) -> Memory:
    """Three rows, the last without entries, the second with fewer than k; two heads."""
    memory = Memory(3, 2, 53, 7, dtype)
    valid = torch.ones(3, 61, dtype=torch.bool)
    valid[1, 5:] = False
    valid[2] = False
    memory.append(torch.randn(3, 2, 61, 7), torch.randn(3, 2, 61, 7), valid)
    return memory


@pytest.mark.parametrize("seed", [None, 5])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_reading_in_place_equals_reading_copies_in_value_and_gradient(
    dtype: torch.dtype, seed: int | None
) -> None:
    torch.manual_seed(0)
    memory = fill_memory(dtype)
    scale = torch.tensor([1.5, 0.5])
    queries = torch.randn(3, 2, 17, 7, dtype=dtype)
    retrieved = memory.retrieve(queries, 11, value_seed=seed)
    scaled = (queries * scale.to(dtype).view(-1, 1, 1)).requires_grad_()
    output_weight, sum_weight = torch.randn(3, 2, 17, 7), torch.randn(3, 2, 17)
    results = []
    for output, weights, log_sum in (
        attend_to_retrieved(scaled, retrieved, scale),
        attend_to_copies(scaled, retrieved),
    ):
        found = log_sum.masked_fill(log_sum.isinf(), 0)
        total = (output * output_weight).sum() + (found * sum_weight).sum()
        results.append((output, weights, log_sum, torch.autograd.grad(total, scaled)[0]))
    assert (results[0][0][2] == 0).all()
    tolerance = {} if dtype.itemsize > 2 else {"rtol": 3e-2, "atol": 3e-2}
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, **tolerance)


@pytest.mark.parametrize("change", ["append", "reset", "replace", "load"])
def test_a_backward_pass_after_the_memory_changed_is_refused(change: str) -> None:
    memory = fill_memory(torch.float32)
    queries = torch.randn(3, 2, 17, 7, requires_grad=True)
    output, _, _ = attend_to_retrieved(queries, memory.retrieve(queries, 11))
    if change == "append":
        memory.append(torch.randn(3, 2, 1, 7), torch.randn(3, 2, 1, 7))
    elif change == "load":
        memory.load_state_dict(fill_memory(torch.float32).state_dict())
    else:
        memory.reset(torch.tensor([True, False, False]))
    if change == "replace":
        entries = torch.randn(3, 2, 61, 7)
        memory.append(entries, entries, torch.tensor([[True], [False], [False]]).expand(3, 61))
    with pytest.raises(StateError, match="after backward"):
        output.sum().backward()


def test_grouped_queries_share_the_entries_of_their_head() -> None:
    torch.manual_seed(0)
    memory = fill_memory(torch.float32)
    queries = torch.randn(3, 6, 17, 7)
    num_hidden = torch.randint(0, 4, (3, 17))
    grouped = memory.retrieve(queries, 11, num_hidden=num_hidden)
    for member in range(3):
        alone = memory.retrieve(queries[:, member::3], 11, num_hidden=num_hidden)
        assert torch.equal(grouped.neighbors.slots[:, member::3], alone.neighbors.slots)
        assert torch.equal(grouped.fetch_values()[:, member::3], alone.fetch_values())
    for heads in (1, 3, 0):
        with pytest.raises(StateError, match="2 or a multiple"):
            memory.retrieve(queries[:, :heads], 11)


@pytest.mark.parametrize("num_neighbors", [11, 13])
def test_finding_every_entry_equals_dense_attention_over_the_memory(num_neighbors: int) -> None:
    torch.manual_seed(0)
    memory = Memory(2, 3, 13, 5, torch.float32)
    keys, values = torch.randn(2, 3, 11, 5), torch.randn(2, 3, 11, 5)
    memory.append(keys, values)
    queries = torch.randn(2, 3, 7, 5, requires_grad=True)
    output, _, log_sum = attend_to_retrieved(queries, memory.retrieve(queries, num_neighbors))
    scores = queries @ keys.transpose(-1, -2)
    expected = torch.softmax(scores, -1) @ values
    torch.testing.assert_close(output, expected)
    torch.testing.assert_close(log_sum, torch.logsumexp(scores, -1))
    weight = torch.randn_like(output)
    ours, theirs = (
        torch.autograd.grad((result * weight).sum(), queries)[0] for result in (output, expected)
    )
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("num_neighbors", [3, 11])
def test_the_place_of_an_entry_in_the_ring_changes_nothing(num_neighbors: int) -> None:
    torch.manual_seed(0)
    entries, queries = torch.randn(1, 2, 11, 5), torch.randn(1, 2, 7, 5)
    outputs = []
    for num_before in (0, 4, 10):
        memory = Memory(1, 2, 11, 5, torch.float32)
        before = torch.randn(1, 2, num_before, 5)
        memory.append(before, before)
        memory.append(entries, entries)
        outputs.append(attend_to_retrieved(queries, memory.retrieve(queries, num_neighbors))[0])
    for output in outputs[1:]:
        torch.testing.assert_close(output, outputs[0])


@pytest.mark.parametrize("attend", [attend_to_retrieved, attend_to_copies])
def test_missing_entries_weigh_exactly_zero(
    attend: Callable[..., tuple[torch.Tensor, ...]],
) -> None:
    torch.manual_seed(0)
    memory = fill_memory(torch.float32)
    query = torch.randn(3, 2, 1, 7, requires_grad=True)
    retrieved = memory.retrieve(query, 11)
    output, weights, log_sum = attend(query, retrieved)
    valid = retrieved.neighbors.valid
    assert valid.sum(-1)[:, 0, 0].tolist() == [11, 5, 0]
    assert (weights[~valid] == 0).all()
    assert (output[2] == 0).all()
    assert torch.isneginf(log_sum[2]).all()
    output.sum().backward()
    assert torch.isfinite(query.grad).all()


def test_the_gate_is_the_sigmoid_of_its_bias() -> None:
    local, memory = torch.tensor([[[[2.0]], [[2.0]]]]), torch.tensor([[[[10.0]], [[10.0]]]])
    found = torch.tensor([[[True], [True]]])
    mixed = combine_by_gate(local, memory, torch.tensor([0.0, math.log(3.0)]), found)
    torch.testing.assert_close(mixed.flatten(), torch.tensor([6.0, 8.0]))


def test_the_joint_softmax_equals_one_softmax_over_both() -> None:
    torch.manual_seed(0)
    local_scores, memory_scores = torch.randn(7), torch.randn(3)
    local_values, memory_values = torch.randn(7, 5), torch.randn(3, 5)
    expected = torch.softmax(torch.cat([local_scores, memory_scores]), 0) @ torch.cat(
        [local_values, memory_values]
    )
    joint = combine_jointly(
        (torch.softmax(local_scores, 0) @ local_values).view(1, 1, 1, 5),
        (torch.softmax(memory_scores, 0) @ memory_values).view(1, 1, 1, 5),
        torch.logsumexp(local_scores, 0).view(1, 1, 1),
        torch.logsumexp(memory_scores, 0).view(1, 1, 1),
        torch.ones(1, 1, 1, dtype=torch.bool),
    )
    torch.testing.assert_close(joint.flatten(), expected)
