"""Compressive Transformer (Rae et al. 2020, arXiv 1911.05507): what leaves the cache is compressed.

Groups of c neighboring tokens that left the window become one slot of a memory that is first in,
first out, by a convolution of width and stride c, one for keys and one for values:

    k~_g = normalize(sum over i < c of a_i * k_(g c + i)),  v~_g = sum over i of b_i * v_(g c + i)

A query at position t attends, in one softmax, to its window, t - W < j <= t, and to the last M
groups that ended before it, (g + 1) c <= t - W + 1. To the scores of slots a learned bias per head
is added. The convolutions learn by the paper's attention reconstruction (its section 3.2): as the
tokens of a segment push others out of the window, the queries' attention to those tokens is to be
the same as to their slots,

    loss = mean |softmax(q K^T) V - softmax(q K~^T) V~|^2,

in which everything but the convolutions is held fixed, and nothing else teaches them.

**Deviations**: the convolutions are per head and channel, where the paper's mix all channels of a
layer, which would be a tenth more parameters; they start as means; keys and values are compressed,
and not the hidden states that they are made of; every `sample_every`-th query takes part in the
reconstruction.

Shapes: B rows, H heads, T tokens of a call, C kept tokens, M slots, G groups of c tokens that may
leave the window in a call, D head_dim.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from attentions.slots import (
    attend_to_slots,
    attend_window,
    gather_spans,
    join_far,
    make_far_bias,
)
from memorizing.config import ModelConfig
from memorizing.memory import Entries
from memorizing.model.block import (
    AttentionLayer,
    AttentionResult,
    Reading,
    normalize,
)
from memorizing.model.layout import Layout
from memorizing.model.mixing import keep_recent


class Compressive(AttentionLayer):
    """Attention to the window and to a compressed memory of the tokens before it."""

    def __init__(
        self,
        config: ModelConfig,
        has_memory: bool,
        num_slots: int = 2048,
        rate: int = 4,
        sample_every: int = 4,
    ) -> None:
        """Make the convolutions, which start as means.

        Args:
            config: of the model.
            has_memory: as for other layers; none is read.
            num_slots: M.
            rate: c, at most the window.
            sample_every: of so many queries one takes part in the reconstruction.
        """
        super().__init__(config, has_memory)
        assert rate <= config.window
        self.num_slots, self.rate, self.sample_every = num_slots, rate, sample_every
        self.far_bias = make_far_bias(config.num_heads)
        shape = (config.num_heads, rate, config.head_dim)
        self.compress_keys, self.compress_values = (
            nn.Parameter(torch.full(shape, 1.0 / rate)) for _ in range(2)
        )

    @property
    def num_tokens(self) -> int:
        """C: the window, and what has left it without its group."""
        return self.config.window + self.rate

    @property
    def num_kept(self) -> int:
        """M slots, then C tokens; which of them count follows from the position."""
        return self.num_slots + self.num_tokens

    def forward(
        self,
        x: Tensor,
        layout: Layout,
        cache: Entries,
        recent: Tensor | None,
        reading: Reading | None,
    ) -> AttentionResult:
        """See `AttentionLayer`."""
        assert reading is None
        new = self.project(x, layout, recent)
        sizes = (self.num_slots, self.num_tokens)
        (slot_keys, keys), (slot_values, values) = (
            part.split(sizes, 2) for part in (cache.keys, cache.values)
        )
        keys = torch.cat([keys, new.keys], 2)
        values = torch.cat([values, new.values], 2)
        attended, log_sum = attend_window(self, new, keys, values, layout)
        position = layout.position[:, 0]
        # Groups before the window of the token before the call, and of every token of the call.
        oldest = (position - self.config.window) // self.rate
        ended = (layout.position - self.config.window + 1) // self.rate
        num_groups = -(-x.shape[1] // self.rate)
        column = oldest * self.rate - position + self.num_tokens
        left_keys, left_values = (
            gather_spans(part.detach(), column, num_groups * self.rate) for part in (keys, values)
        )
        with torch.no_grad():
            made = self._compress(left_keys, left_values)
            slot_keys = torch.cat([slot_keys, made[0]], 2)
            slot_values = torch.cat([slot_values, made[1]], 2)
        if bool((ended > 0).any()):
            shift = self.num_slots - oldest.unsqueeze(1)
            first = (ended - self.num_slots).clamp(min=0) + shift
            last = ended + shift
            far, far_log_sum = attend_to_slots(
                new.scaled_queries, slot_keys, slot_values, first, last
            )
            near = attended, log_sum
            attended = join_far(near, (far, far_log_sum), self.far_bias, last > first)
        # Of each row, how many groups are new: none before the window is full.
        num_ended = (position + layout.num_new - self.config.window) // self.rate
        if self.training and torch.is_grad_enabled() and bool((num_ended > 0).any()):
            exists = torch.arange(num_groups) + oldest.unsqueeze(1)
            exists = (exists >= 0) & (exists < num_ended.unsqueeze(1))
            loss = self._reconstruct(
                new.scaled_queries, left_keys, left_values, exists, layout.valid
            )
            attended = _AddLoss.apply(attended, loss)
        advance = num_ended - oldest
        slots = (gather_spans(p, advance, self.num_slots) for p in (slot_keys, slot_values))
        raw = (keep_recent(part, self.num_tokens, layout) for part in (keys, values))
        kept = Entries(*(torch.cat(pair, 2) for pair in zip(slots, raw, strict=True)))
        output = self.project_output(attended)
        return AttentionResult(output, kept, None, new.recent, None, None)

    def _compress(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """(B, H, G c, D) to (B, H, G, D), keys normalized."""
        compressed = (
            (part.unflatten(2, (-1, self.rate)) * weights.to(part.dtype).unsqueeze(1)).sum(3)
            for part, weights in ((keys, self.compress_keys), (values, self.compress_values))
        )
        slot_keys, slot_values = compressed
        return normalize(slot_keys), slot_values

    def _reconstruct(
        self, queries: Tensor, keys: Tensor, values: Tensor, exists: Tensor, valid: Tensor
    ) -> Tensor:
        """The mean squared error of the attention to slots instead of to their tokens.

        Args:
            queries: (B, H, T, D), scaled.
            keys: (B, H, G c, D), of the tokens that leave the window.
            values: likewise.
            exists: (B, G) bool on the CPU: groups that are complete, and of this document.
            valid: (B, T) bool on the CPU: queries that are not padding.
        """
        queries = queries.detach()[:, :, :: self.sample_every]
        counted = valid[:, :: self.sample_every] & exists.any(1, keepdim=True)
        exists = exists.to(queries.device)
        slots = _attend(queries, *self._compress(keys, values), exists)
        with torch.no_grad():
            tokens = _attend(queries, keys, values, exists.repeat_interleave(self.rate, 1))
        counted = counted.to(queries.device)
        wide = torch.promote_types(slots.dtype, torch.float32)
        errors = (slots.to(wide) - tokens.to(wide)).square().mean((1, 3))
        return (errors * counted).sum() / counted.sum().clamp(min=1)


def _attend(queries: Tensor, keys: Tensor, values: Tensor, exists: Tensor) -> Tensor:
    """softmax(Q K^T) V over the keys that exist (B, S)."""
    scores = torch.matmul(queries, keys.transpose(-1, -2))
    scores = scores.masked_fill(~exists[:, None, None], torch.finfo(scores.dtype).min)
    return torch.matmul(torch.softmax(scores, -1), values)


class _AddLoss(torch.autograd.Function):
    """x itself; in the backward pass the loss gets its gradient, 1, wherever x is used."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, loss: Tensor) -> Tensor:
        ctx.like = loss.new_ones(())
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        return grads[0], ctx.like
