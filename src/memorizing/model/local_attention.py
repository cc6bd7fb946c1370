"""Attention over the local context: plain products and a softmax, with a hand-written backward.

`scaled_dot_product_attention` with a bias that needs a gradient takes a slow path on CPUs, and
autograd's own backward of the plain operations keeps and touches more score-sized tensors than it
must.

Shapes: B rows, H heads, T queries, S keys, D head_dim.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def attend_locally(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    bias: Tensor,
    num_hidden_keys: Sequence[int],
    need_log_sum: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """V_c = softmax(Q K^T + bias) V (paper, section 3), and the log of the softmax's denominator.

    Args:
        queries: (B, H, T, D), already scaled.
        keys: (B, H, S, D).
        values: (B, H, S, D).
        bias: (H, T, S) or (B, H, T, S), -inf where a query must not look; every query sees one key
            at least.
        num_hidden_keys: per row, how many of the first keys do not exist (a cache that is not
            full).
        need_log_sum: whether the second result is wanted.

    Returns:
        (B, H, T, D), and (B, H, T) log-sum-exp of the scores or None. Both have gradients to all
        four tensors, but no second derivatives: asking for them raises.
    """
    return _LocalAttention.apply(queries, keys, values, bias, tuple(num_hidden_keys), need_log_sum)


class _LocalAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx,
        queries: Tensor,
        keys: Tensor,
        values: Tensor,
        bias: Tensor,
        num_hidden_keys: tuple[int, ...],
        need_log_sum: bool,
    ) -> tuple[Tensor, Tensor | None]:
        scores = torch.matmul(queries, keys.transpose(-1, -2))
        scores += bias
        for row, num_hidden in enumerate(num_hidden_keys):
            if num_hidden:
                scores[row, :, :, :num_hidden] = -math.inf
        log_sum = (
            torch.logsumexp(scores.float() if scores.dtype != torch.float64 else scores, -1)
            if need_log_sum
            else None
        )
        probabilities = torch.softmax(scores, dim=-1)
        ctx.save_for_backward(queries, keys, values, probabilities)
        ctx.bias_has_rows = bias.dim() == 4
        return torch.matmul(probabilities, values), log_sum

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad_output, grad_log_sum = grads
        queries, keys, values, probabilities = ctx.saved_tensors
        grad_values = torch.matmul(probabilities.transpose(-1, -2), grad_output)
        grad_probabilities = torch.matmul(grad_output, values.transpose(-1, -2))
        grad_scores = torch.ops.aten._softmax_backward_data(
            grad_probabilities, probabilities, -1, probabilities.dtype
        )
        if grad_log_sum is not None:
            grad_scores += probabilities * grad_log_sum.unsqueeze(-1).to(probabilities.dtype)
        grad_queries = torch.matmul(grad_scores, keys)
        grad_keys = torch.matmul(grad_scores.transpose(-1, -2), queries)
        grad_bias = grad_scores if ctx.bias_has_rows else grad_scores.sum(0)
        return grad_queries, grad_keys, grad_values, grad_bias, None, None
