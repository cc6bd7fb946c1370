"""Attention to a few slots that each stand for many tokens, and the window that they stand before.

Linformer and the Compressive Transformer both attend exactly to the tokens nearby, and to slots for
those before them, in one softmax. Plain products would keep the scores of all slots in fp32; here
queries go through in blocks, as in the library's local attention, with a hand-written backward.

Shapes: B rows, H heads, T queries, S keys, M slots, W tokens of the window, D head_dim.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from memorizing.model.attention import attend_locally, combine_jointly
from memorizing.model.block import AttentionLayer, Projected
from memorizing.model.layout import Layout

FAR_BIAS_START = -3.0
"""At 0, thousands of slots that are not trained yet would drown the window."""
_BLOCK_LEN = 128
"""Queries that go through together: their scores stay in the cache."""


def attend_window(
    layer: AttentionLayer, new: Projected, keys: Tensor, values: Tensor, layout: Layout
) -> tuple[Tensor, Tensor]:
    """Exact attention over the window, as the model's own, and the log-sum-exp of its scores.

    Args:
        layer: has the position bias.
        new: queries of the call.
        keys: (B, H, S, D): the call's at the end, and at least W before them, without gradient.
        values: likewise.
        layout: of the call; what is before a document's beginning does not count.
    """
    window = layer.config.window
    first = keys.shape[2] - new.keys.shape[2] - window
    hidden = window - layout.position[:, 0].clamp(max=window)
    attended, log_sum = attend_locally(
        new.scaled_queries,
        keys[:, :, first:],
        values[:, :, first:],
        layer.position_bias(new.keys.shape[2], keys.dtype),
        hidden.tolist(),
        num_frozen_keys=window,
        need_log_sum=True,
    )
    assert log_sum is not None
    return attended, log_sum


def make_far_bias(num_heads: int) -> nn.Parameter:
    """(H,): what is added to the scores of all that is before the window, learned per head."""
    return nn.Parameter(torch.full((num_heads,), FAR_BIAS_START))


def join_far(
    near: tuple[Tensor, Tensor], far: tuple[Tensor, Tensor], far_bias: Tensor, found: Tensor
) -> Tensor:
    """One softmax (B, H, T, D) over the window and what is before it.

    Args:
        near: what a softmax over the window gives, and the log-sum-exp (B, H, T) of its scores.
        far: likewise, of what is before it.
        far_bias: (H,), added to its scores.
        found: (B, T) bool: whether a query sees anything of it.
    """
    (attended, log_sum), (other, other_log_sum) = near, far
    seen = found.to(attended.device).unsqueeze(1)
    return combine_jointly(attended, other, log_sum, other_log_sum + far_bias.unsqueeze(1), seen)


def gather_spans(x: Tensor, first: Tensor, length: int) -> Tensor:
    """(B, H, length, D): neighboring columns of x (B, H, S, D), from (B,) `first` of each row on.

    A view where all rows begin alike.
    """
    start = int(first[0])
    if bool((first == start).all()):
        return x[:, :, start : start + length]
    places = (first.view(-1, 1) + torch.arange(length)).to(x.device)
    return x.gather(2, places[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3]))


def attend_to_slots(
    queries: Tensor, keys: Tensor, values: Tensor, first: Tensor, last: Tensor
) -> tuple[Tensor, Tensor]:
    """softmax(Q K^T) V over the slots that each query sees.

    Args:
        queries: (B, H, T, D), scaled.
        keys: (B, H, M, D).
        values: (B, H, M, D).
        first: (B, T) int64 on the CPU: the first slot that a query sees.
        last: (B, T): the first one after those that it sees. Neither falls along the queries.

    Returns:
        (B, H, T, D), and (B, H, T) log-sum-exp of the scores. Those of a query that sees no slot
        are finite and mean nothing. Gradients flow into queries, keys and values.
    """
    return _SlotAttention.apply(queries, keys, values, first, last)


class _SlotAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, queries: Tensor, keys: Tensor, values: Tensor, first: Tensor, last: Tensor
    ) -> tuple[Tensor, Tensor]:
        output = torch.zeros_like(queries, memory_format=torch.contiguous_format)
        wide = torch.promote_types(queries.dtype, torch.float32)
        lowest = torch.finfo(queries.dtype).min
        log_sum = torch.full(queries.shape[:3], lowest, dtype=wide, device=queries.device)
        ctx.blocks, kept = _list_blocks(first, last), []
        for rows, columns in ctx.blocks:
            scores = torch.matmul(queries[:, :, rows], keys[:, :, columns].transpose(-1, -2))
            places = torch.arange(columns.start, columns.stop)
            low, high = (part[:, rows].unsqueeze(-1) for part in (first, last))
            hidden = (places < low) | (places >= high)
            if bool(hidden.any()):
                scores.masked_fill_(hidden.unsqueeze(1).to(scores.device), lowest)
            log_sum[:, :, rows] = torch.logsumexp(scores.to(wide), -1)
            probabilities = torch.softmax(scores, -1)
            output[:, :, rows] = torch.matmul(probabilities, values[:, :, columns])
            kept.append(probabilities)
        ctx.save_for_backward(queries, keys, values, *kept)
        return output, log_sum

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad_output, grad_log_sum = grads
        queries, keys, values, *kept = ctx.saved_tensors
        wide = torch.promote_types(queries.dtype, torch.float32)
        grad_queries = torch.zeros_like(queries, memory_format=torch.contiguous_format)
        # Blocks see the same slots: what they add is summed in fp32.
        grad_keys, grad_values = (
            torch.zeros_like(part, dtype=wide) if needed else None
            for part, needed in zip((keys, values), ctx.needs_input_grad[1:3], strict=True)
        )
        for (rows, columns), probabilities in zip(ctx.blocks, kept, strict=True):
            grad_block = grad_output[:, :, rows]
            grad_scores = torch.ops.aten._softmax_backward_data(
                torch.matmul(grad_block, values[:, :, columns].transpose(-1, -2)),
                probabilities,
                -1,
                probabilities.dtype,
            )
            share = grad_log_sum[:, :, rows].unsqueeze(-1).to(probabilities.dtype)
            grad_scores += probabilities * share
            grad_queries[:, :, rows] = torch.matmul(grad_scores, keys[:, :, columns])
            if grad_keys is not None:
                found = torch.matmul(grad_scores.transpose(-1, -2), queries[:, :, rows])
                grad_keys[:, :, columns] += found
            if grad_values is not None:
                found = torch.matmul(probabilities.transpose(-1, -2), grad_block)
                grad_values[:, :, columns] += found
        return (
            grad_queries,
            None if grad_keys is None else grad_keys.to(keys.dtype),
            None if grad_values is None else grad_values.to(values.dtype),
            None,
            None,
        )


def _list_blocks(first: Tensor, last: Tensor) -> list[tuple[slice, slice]]:
    """Queries of each block and the slots that some of them see; blocks that see none are left out.

    Rows at the beginning of their documents see none, and must not widen the blocks of the others.
    """
    blocks = []
    for start in range(0, first.shape[1], _BLOCK_LEN):
        rows = slice(start, min(start + _BLOCK_LEN, first.shape[1]))
        low, high = first[:, rows], last[:, rows]
        seen = low < high
        if bool(seen.any()):
            blocks.append((rows, slice(int(low[seen].min()), int(high[seen].max()))))
    return blocks
