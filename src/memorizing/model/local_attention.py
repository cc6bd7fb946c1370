"""Attention over the local context: blocks of queries, each with the keys it can see.

`scaled_dot_product_attention` with a bias that needs a gradient takes a slow path on CPUs, and the
plain product of a segment with its context is masked away by half. Here the queries go through in
blocks, so that scores stay in the cache and keys outside the window are left out, with a
hand-written backward.

Shapes: B rows, H heads, T queries, S keys, D head_dim, R queries of a block.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def attend_locally(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    bias: Tensor,
    num_hidden_keys: Sequence[int],
    *,
    num_frozen_keys: int = 0,
    need_log_sum: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """V_c = softmax(Q K^T + bias) V (paper, section 3), and the log of the softmax's denominator.

    Args:
        queries: (B, H, T, D), already scaled: the last T of S contiguous tokens.
        keys: (B, H, S, D).
        values: (B, H, S, D).
        bias: (H, R, W + R), the same for every block of R queries that are neighbors, with the keys
            from W before the block's first query to its last. -inf where a query must not look;
            every query sees one key at least.
        num_hidden_keys: per row, how many of the first keys do not exist (a cache that is not
            full).
        num_frozen_keys: the first keys and values that need no gradient and get 0.
        need_log_sum: whether the second result is wanted.

    Returns:
        (B, H, T, D), and (B, H, T) log-sum-exp of the scores or None. Both have gradients to all
        four tensors, but no second derivatives: asking for them raises.
    """
    return _LocalAttention.apply(
        queries, keys, values, bias, tuple(num_hidden_keys), num_frozen_keys, need_log_sum
    )


class _LocalAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx,
        queries: Tensor,
        keys: Tensor,
        values: Tensor,
        bias: Tensor,
        num_hidden_keys: tuple[int, ...],
        num_frozen_keys: int,
        need_log_sum: bool,
    ) -> tuple[Tensor, Tensor | None]:
        output = torch.empty_like(queries, memory_format=torch.contiguous_format)
        wide = torch.promote_types(queries.dtype, torch.float32)
        log_sum = torch.empty(queries.shape[:3], dtype=wide, device=queries.device)
        kept = []
        for rows, columns, places in _iterate_blocks(queries.shape[2], keys.shape[2], bias):
            scores = torch.matmul(queries[:, :, rows], keys[:, :, columns].transpose(-1, -2))
            scores += bias[:, : scores.shape[2], places]
            for row, num_hidden in enumerate(num_hidden_keys):
                if num_hidden > columns.start:
                    scores[row, :, :, : num_hidden - columns.start] = -math.inf
            if need_log_sum:
                log_sum[:, :, rows] = torch.logsumexp(scores.to(wide), -1)
            probabilities = torch.softmax(scores, dim=-1)
            output[:, :, rows] = torch.matmul(probabilities, values[:, :, columns])
            kept.append(probabilities)
        ctx.save_for_backward(queries, keys, values, bias, *kept)
        ctx.num_frozen_keys = num_frozen_keys
        return output, log_sum if need_log_sum else None

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad_output, grad_log_sum = grads
        queries, keys, values, bias, *kept = ctx.saved_tensors
        wide = torch.promote_types(queries.dtype, torch.float32)
        grad_queries = torch.empty_like(queries, memory_format=torch.contiguous_format)
        # Blocks overlap: what they add to the same keys and biases is summed in fp32.
        grad_keys, grad_values = (torch.zeros_like(part, dtype=wide) for part in (keys, values))
        grad_bias = torch.zeros_like(bias, dtype=wide) if ctx.needs_input_grad[3] else None
        blocks = _iterate_blocks(queries.shape[2], keys.shape[2], bias)
        for (rows, columns, places), probabilities in zip(blocks, kept, strict=True):
            grad_block = grad_output[:, :, rows]
            grad_scores = torch.ops.aten._softmax_backward_data(
                torch.matmul(grad_block, values[:, :, columns].transpose(-1, -2)),
                probabilities,
                -1,
                probabilities.dtype,
            )
            if grad_log_sum is not None:
                share = grad_log_sum[:, :, rows].unsqueeze(-1).to(probabilities.dtype)
                grad_scores += probabilities * share
            grad_queries[:, :, rows] = torch.matmul(grad_scores, keys[:, :, columns])
            first = max(columns.start, ctx.num_frozen_keys)
            if first < columns.stop:
                live = slice(first - columns.start, None)
                of_scores, of_values = (
                    part[..., live].transpose(-1, -2) for part in (grad_scores, probabilities)
                )
                grad_keys[:, :, first : columns.stop] += torch.matmul(
                    of_scores, queries[:, :, rows]
                )
                grad_values[:, :, first : columns.stop] += torch.matmul(of_values, grad_block)
            if grad_bias is not None:
                over_rows = grad_scores.sum(0) if len(grad_scores) > 1 else grad_scores[0]
                grad_bias[:, : grad_scores.shape[2], places] += over_rows
        return (
            grad_queries,
            grad_keys.to(keys.dtype),
            grad_values.to(values.dtype),
            None if grad_bias is None else grad_bias.to(bias.dtype),
            None,
            None,
            None,
        )


def _iterate_blocks(
    num_queries: int, num_keys: int, bias: Tensor
) -> Iterator[tuple[slice, slice, slice]]:
    """Queries of each block, the keys they may see, and where these stand in the block's bias."""
    block_len = bias.shape[1]
    context = bias.shape[2] - block_len
    for start in range(0, num_queries, block_len):
        stop = min(start + block_len, num_queries)
        own = num_keys - num_queries + start
        first = max(0, own - context)
        last = num_keys - num_queries + stop
        offset = context - (own - first)
        yield slice(start, stop), slice(first, last), slice(offset, offset + last - first)
