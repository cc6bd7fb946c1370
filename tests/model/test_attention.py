"""Attention over the local context and over what was retrieved, against the plain formulas."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from memorizing.errors import StateError
from memorizing.memory import Memory
from memorizing.model.attention import (
    PositionBias,
    attend_locally,
    attend_to_copies,
    attend_to_retrieved,
    combine_by_gate,
    combine_jointly,
    compute_buckets,
)


def test_buckets_are_those_of_t5() -> None:
    # 32 buckets, max distance 128: 0 to 15 exact, then 16 + int(log(d / 16) / log(8) * 16).
    distances = torch.tensor([0, 1, 15, 16, 17, 18, 19, 31, 32, 64, 127, 128, 511])
    expected = [0, 1, 15, 16, 16, 16, 17, 21, 21, 26, 31, 31, 31]
    assert compute_buckets(distances, 32, 128).tolist() == expected


def make_bias(window: int) -> PositionBias:
    torch.manual_seed(0)
    bias = PositionBias(num_heads=3, num_buckets=6, max_distance=5, window=window).double()
    with torch.no_grad():
        bias.table.normal_()
    return bias


def measure_distances(num_queries: int, window: int) -> torch.Tensor:
    """From query r of a block to the keys from `window` before its first query to its last."""
    own = torch.arange(num_queries) + window
    return own.unsqueeze(1) - torch.arange(window + num_queries)


def test_keys_outside_the_causal_window_are_masked() -> None:
    bias = make_bias(window=3)(5, torch.float32)
    distances = measure_distances(5, 3)
    assert torch.equal(torch.isinf(bias[0]), (distances < 0) | (distances >= 3))


def test_the_longest_block_is_a_quarter_of_the_window_but_at_least_32_queries() -> None:
    assert make_bias(window=7)(101, torch.float32).shape == (3, 32, 7 + 32)
    assert make_bias(window=164)(101, torch.float32).shape == (3, 41, 164 + 41)
    assert make_bias(window=164)(13, torch.float32).shape == (3, 13, 164 + 13)


@pytest.mark.parametrize("num_queries", [1, 2, 7])
@pytest.mark.parametrize("window", [1, 5, 11])
def test_the_bias_of_a_block_is_that_of_every_pair_in_value_and_gradient(
    num_queries: int, window: int
) -> None:
    bias = make_bias(window)
    fast = bias(num_queries, torch.float64)
    distances = measure_distances(num_queries, window)
    buckets = compute_buckets(distances.clamp(0, window - 1), 6, 5)
    outside = (distances < 0) | (distances >= window)
    plain = bias.table[:, buckets].masked_fill(outside, -torch.inf)
    assert torch.equal(fast, plain)
    weight = torch.randn_like(fast).masked_fill(torch.isinf(fast), 0)
    gradients = []
    for value in (fast, plain):
        total = (value.masked_fill(torch.isinf(value), 0) * weight).sum()
        gradients.append(torch.autograd.grad(total, bias.table)[0])
    torch.testing.assert_close(*gradients)


def attend_plainly(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor, hidden: list[int]
) -> tuple[Tensor, Tensor]:
    scores = q @ k.transpose(-1, -2) + bias
    columns = torch.arange(k.shape[2])
    mask = columns < torch.tensor(hidden).view(-1, 1, 1, 1)
    scores = scores.masked_fill(mask, -math.inf)
    return torch.softmax(scores, -1) @ v, torch.logsumexp(scores, -1)


def test_values_and_gradients_equal_the_plain_formula() -> None:
    torch.manual_seed(0)
    q = torch.randn(3, 2, 5, 7, dtype=torch.float64, requires_grad=True)
    k, v = (torch.randn(3, 2, 11, 7, dtype=torch.float64, requires_grad=True) for _ in range(2))
    bias = torch.randn(2, 5, 11, dtype=torch.float64)
    causal = torch.arange(11) - 6 > torch.arange(5).unsqueeze(1)
    bias = bias.masked_fill(causal, -math.inf).requires_grad_()
    hidden = [0, 4, 6]
    out_weight, sum_weight = torch.randn(3, 2, 5, 7), torch.randn(3, 2, 5)
    results = []
    for output, log_sum in (
        attend_locally(q, k, v, bias, hidden, need_log_sum=True),
        attend_plainly(q, k, v, bias, hidden),
    ):
        total = (output * out_weight).sum() + (log_sum * sum_weight).sum()
        results.append((output, log_sum, *torch.autograd.grad(total, [q, k, v, bias])))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, torch.nan_to_num(theirs))


def expand_bias(block: Tensor, num_queries: int, num_keys: int) -> Tensor:
    """The bias of all scores from that of a block, written out by place."""
    block_len = block.shape[1]
    context = block.shape[2] - block_len
    rows = []
    for query in range(num_queries):
        first = query - query % block_len + num_keys - num_queries - context
        row = torch.full((block.shape[0], num_keys), -math.inf, dtype=block.dtype)
        for key in range(max(0, first), min(num_keys, first + block.shape[2])):
            row[:, key] = block[:, query % block_len, key - first]
        rows.append(row)
    return torch.stack(rows, 1)


@pytest.mark.parametrize("num_frozen", [0, 5, 13])
@pytest.mark.parametrize(("num_queries", "num_keys"), [(11, 24), (11, 11), (3, 5), (2, 13), (7, 8)])
def test_blocks_equal_the_plain_formula(num_queries: int, num_keys: int, num_frozen: int) -> None:
    torch.manual_seed(0)
    q = torch.randn(3, 2, num_queries, 7, dtype=torch.float64, requires_grad=True)
    k, v = (
        torch.randn(3, 2, num_keys, 7, dtype=torch.float64, requires_grad=True) for _ in range(2)
    )
    # Blocks of 3 queries, a window of 5: key `place` of query r has distance r + 6 - place.
    distances = torch.arange(3).unsqueeze(1) + 6 - torch.arange(9)
    block = torch.randn(2, 3, 9, dtype=torch.float64)
    block = block.masked_fill((distances < 0) | (distances > 4), -math.inf).requires_grad_()
    num_cached = num_keys - num_queries
    hidden = [0, num_cached // 2, num_cached]
    out_weight, sum_weight = torch.randn(3, 2, num_queries, 7), torch.randn(3, 2, num_queries)
    results = []
    bias = expand_bias(block, num_queries, num_keys)
    for output, log_sum in (
        attend_locally(q, k, v, block, hidden, num_frozen_keys=num_frozen, need_log_sum=True),
        attend_plainly(q, k, v, bias, hidden),
    ):
        total = (output * out_weight).sum() + (log_sum * sum_weight).sum()
        results.append([output, log_sum, *torch.autograd.grad(total, [q, k, v, block])])
    for index in (3, 4):
        results[1][index][:, :, :num_frozen] = 0
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, torch.nan_to_num(theirs))


def test_a_second_derivative_is_refused() -> None:
    q, k, v = (torch.randn(1, 2, 3, 5, requires_grad=True) for _ in range(3))
    output, _ = attend_locally(q, k, v, torch.zeros(2, 3, 3), [0])
    (first,) = torch.autograd.grad(output.square().sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()


def test_without_the_log_sum_the_output_is_the_same() -> None:
    torch.manual_seed(0)
    q, k, v = torch.randn(1, 2, 3, 5), torch.randn(1, 2, 3, 5), torch.randn(1, 2, 3, 5)
    with_sum, _ = attend_locally(q, k, v, torch.zeros(2, 3, 3), [0], need_log_sum=True)
    without, log_sum = attend_locally(q, k, v, torch.zeros(2, 3, 3), [0])
    assert torch.equal(with_sum, without)
    assert log_sum is None


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


def test_what_finds_nothing_gives_the_local_value_or_the_one_for_an_empty_memory() -> None:
    local, memory = torch.tensor([[[[2.0], [4.0]]]]), torch.tensor([[[[10.0], [0.0]]]])
    found, gate_bias = torch.tensor([[[True, False]]]), torch.tensor([math.log(3.0)])
    closed = combine_by_gate(local, memory, gate_bias, found)
    assert closed.flatten().tolist() == [8.0, 4.0]
    empty = combine_by_gate(local, memory, gate_bias, found, torch.tensor([[-6.0]]))
    torch.testing.assert_close(empty.flatten(), torch.tensor([8.0, 0.25 * 4.0 - 0.75 * 6.0]))


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
