"""The loss against its formula, in value and gradient."""

import math

import pytest
import torch

from memorizing import devices
from memorizing.loss import compute_token_nats, sum_nats


def _make_inputs(
    dtype: torch.dtype = torch.float32,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(2, 7, 13, generator=generator).mul(3).to(dtype)
    targets = torch.randint(13, (2, 7), generator=generator)
    valid = torch.ones(2, 7, dtype=torch.bool)
    valid[1, 5:] = False
    return logits, targets, valid


def test_two_equal_logits_cost_ln_2_per_token():
    nats = sum_nats(
        torch.zeros(1, 3, 2), torch.tensor([[0, 1, 1]]), torch.tensor([[True, True, False]])
    )
    assert nats.item() == pytest.approx(2 * math.log(2), rel=1e-6)


@pytest.mark.parametrize("chunk", [1, 13, 3 * 13, 1 << 20])
def test_value_and_gradient_equal_cross_entropy(monkeypatch, chunk):
    monkeypatch.setattr(devices, "_CPU_CHUNK", chunk)
    logits, targets, valid = _make_inputs()
    mine, reference = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    nats = sum_nats(mine, targets, valid)
    expected = torch.nn.functional.cross_entropy(reference[valid], targets[valid], reduction="sum")
    (nats * 0.25).backward()
    (expected * 0.25).backward()
    torch.testing.assert_close(nats, expected)
    torch.testing.assert_close(mine.grad, reference.grad)


def test_padding_may_hold_anything():
    logits, targets, valid = _make_inputs()
    expected = sum_nats(logits, targets, valid)
    logits[1, 5:] = math.nan
    targets[1, 5:] = -100
    logits.requires_grad_()
    nats = sum_nats(logits, targets, valid)
    nats.backward()
    assert nats.item() == expected.item()
    assert logits.grad is not None
    assert torch.equal(logits.grad[1, 5:], torch.zeros(2, 13))
    assert logits.grad.isfinite().all()


def test_bf16_logits_are_summed_in_fp32_and_get_a_bf16_gradient():
    logits, targets, valid = _make_inputs(torch.bfloat16)
    whole = logits.float().requires_grad_()
    logits.requires_grad_()
    nats, expected = sum_nats(logits, targets, valid), sum_nats(whole, targets, valid)
    nats.backward()
    expected.backward()
    assert nats.dtype == torch.float32
    assert nats.item() == expected.item()
    assert logits.grad is not None
    assert whole.grad is not None
    assert torch.equal(logits.grad, whole.grad.bfloat16())


def test_token_nats_sum_to_the_loss():
    logits, targets, valid = _make_inputs()
    nats = compute_token_nats(logits, targets)
    assert nats.shape == (2, 7)
    torch.testing.assert_close(nats[valid].sum(), sum_nats(logits, targets, valid))
