"""T5's buckets by hand, and the two ways to look the bias up."""

from __future__ import annotations

import torch

from memorizing.model.position_bias import PositionBias, compute_buckets


def test_buckets_are_those_of_t5() -> None:
    # 32 buckets, max distance 128: 0 to 15 exact, then 16 + int(log(d / 16) / log(8) * 16).
    distances = torch.tensor([0, 1, 15, 16, 17, 18, 19, 31, 32, 64, 127, 128, 511])
    expected = [0, 1, 15, 16, 16, 16, 17, 21, 21, 26, 31, 31, 31]
    assert compute_buckets(distances, 32, 128).tolist() == expected


def test_the_bias_of_a_distance_is_the_same_with_and_without_a_cache() -> None:
    torch.manual_seed(0)
    bias = PositionBias(num_heads=3, num_buckets=6, max_distance=5, window=7)
    with torch.no_grad():
        bias.table.normal_()
    whole = bias(11, 11, torch.float32)
    # Five queries after six cached keys are the last five rows of the whole.
    torch.testing.assert_close(bias(5, 11, torch.float32), whole[:, 6:])


def test_keys_outside_the_causal_window_are_masked() -> None:
    bias = PositionBias(num_heads=2, num_buckets=6, max_distance=5, window=3)(5, 7, torch.float32)
    distances = torch.arange(2, 7).unsqueeze(1) - torch.arange(7)
    assert torch.equal(torch.isinf(bias[0]), (distances < 0) | (distances >= 3))


def test_toeplitz_and_looked_up_bias_agree_in_value_and_gradient() -> None:
    torch.manual_seed(0)
    bias = PositionBias(num_heads=3, num_buckets=6, max_distance=5, window=5).double()
    with torch.no_grad():
        bias.table.normal_()
    for queries, keys in ((1, 1), (1, 4), (5, 5), (4, 11), (7, 3 + 7)):
        distances = torch.arange(keys - queries, keys).unsqueeze(1) - torch.arange(keys)
        fast = bias(queries, keys, torch.float64)
        plain = bias.look_up(distances.unsqueeze(0), torch.float64)[0]
        assert torch.equal(fast, plain)
        weight = torch.randn_like(fast).masked_fill(torch.isinf(fast), 0)
        gradients = []
        for value in (fast, plain):
            total = (value.masked_fill(torch.isinf(value), 0) * weight).sum()
            gradients.append(torch.autograd.grad(total, bias.table)[0])
        torch.testing.assert_close(*gradients)
