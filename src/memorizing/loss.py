"""The loss: summed nats of the next token. Callers divide by the target tokens they counted.

B rows, T tokens, V vocabulary, N = B * T.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from memorizing.devices import split_rows


def sum_nats(logits: Tensor, targets: Tensor, valid: Tensor) -> Tensor:
    """Cross entropy, summed over the valid targets.

    sum over valid (b, t) of log sum_v exp(logits[b, t, v]) - logits[b, t, targets[b, t]]

    Computed in fp32 whatever the type of the logits, some tokens at a time, forward and backward:
    beside the logits and their gradient no tensor of N x V exists.

    Args:
        logits: (B, T, V), any floating type.
        targets: (B, T) int64; may hold anything where not valid.
        valid: (B, T) bool.

    Returns:
        A scalar in fp32, in nats. The gradient reaches `logits` in their own type, exactly 0 where
        not valid.
    """
    return _SumNats.apply(logits.flatten(0, -2), targets.flatten(), valid.flatten())  # type: ignore[no-any-return]


def compute_token_nats(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross entropy of every token in nats, without gradient: (B, T, V), (B, T) to (B, T) fp32."""
    with torch.no_grad():
        return _compute_nats(logits.flatten(0, -2), targets.flatten()).view(targets.shape)


def _compute_nats(logits: Tensor, targets: Tensor) -> Tensor:
    nats = torch.empty(targets.shape, dtype=torch.float32, device=logits.device)
    for part in split_rows(logits):
        log_probs = torch.log_softmax(logits[part], dim=-1, dtype=torch.float32)
        nats[part] = log_probs.gather(-1, targets[part, None]).squeeze(-1).neg_()
    return nats


class _SumNats(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor, valid: Tensor) -> Tensor:
        targets = targets.masked_fill(~valid, 0)
        ctx.save_for_backward(logits, targets, valid)
        return _compute_nats(logits, targets).masked_fill_(~valid, 0.0).sum()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        logits, targets, valid = ctx.saved_tensors
        result = torch.empty_like(logits)
        # To ask a GPU would be to wait for it.
        is_whole = valid.device.type == "cpu" and bool(valid.all())
        for part in split_rows(logits):
            probs = torch.softmax(logits[part], dim=-1, dtype=torch.float32)
            ones = probs.new_ones(1, 1).expand(len(probs), 1)
            probs.scatter_add_(-1, targets[part, None], -ones)
            if not is_whole:
                # A product with 0 would keep a NaN of the padding.
                probs.masked_fill_(~valid[part, None], 0.0)
            torch.mul(probs, grad, out=result[part])
        return result, None, None
