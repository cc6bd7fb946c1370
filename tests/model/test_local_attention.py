"""The hand-written backward against autograd through the plain formula."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from memorizing.model.local_attention import attend_locally


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
