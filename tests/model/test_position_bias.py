"""T5's buckets by hand, and the bias of a block against that of every pair by itself."""

from __future__ import annotations

import pytest
import torch

from memorizing.model.position_bias import PositionBias, compute_buckets


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
