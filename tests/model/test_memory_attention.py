"""Attention over retrieved entries and the two ways to combine, by hand."""

from __future__ import annotations

import math

import pytest
import torch

from memorizing.knn import Neighbors
from memorizing.memory import Memory, Retrieved
from memorizing.model.memory_attention import attend_to_retrieved, combine_by_gate, combine_jointly


def make_retrieved(keys: torch.Tensor, values: torch.Tensor, valid: torch.Tensor) -> Retrieved:
    slots = torch.zeros(valid.shape, dtype=torch.int64)
    return Retrieved(keys, values, Neighbors(slots, torch.zeros(valid.shape), valid))


def test_one_query_by_hand() -> None:
    # Scores ln 3 and 0: weights 3/4 and 1/4.
    query = torch.tensor([[[[math.log(3.0), 5.0]]]])
    keys = torch.tensor([[[[[1.0, 0.0], [0.0, 0.0]]]]])
    values = torch.tensor([[[[[4.0, 0.0], [0.0, 8.0]]]]])
    output, weights, log_sum = attend_to_retrieved(
        query, make_retrieved(keys, values, torch.ones(1, 1, 1, 2).bool())
    )
    torch.testing.assert_close(weights.flatten(), torch.tensor([0.75, 0.25]))
    torch.testing.assert_close(output.flatten(), torch.tensor([3.0, 2.0]))
    torch.testing.assert_close(log_sum.flatten(), torch.tensor([math.log(4.0)]))


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


def test_missing_entries_weigh_exactly_zero() -> None:
    torch.manual_seed(0)
    query = torch.randn(1, 1, 2, 3, requires_grad=True)
    keys, values = torch.randn(1, 1, 2, 5, 3), torch.randn(1, 1, 2, 5, 3)
    valid = torch.tensor([[[[True, True, False, False, False], [False] * 5]]])
    output, weights, log_sum = attend_to_retrieved(query, make_retrieved(keys, values, valid))
    assert (weights[~valid] == 0).all()
    assert (output[0, 0, 1] == 0).all()
    assert log_sum[0, 0, 1] == -math.inf
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
