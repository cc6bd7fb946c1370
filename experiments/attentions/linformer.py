"""Linformer (Wang et al. 2020, arXiv 2006.04768), made causal: complete blocks are projected.

Linformer projects the keys and values of the whole input along its length, by learned matrices E
and F, onto a few slots that every query attends to. **It has no causal version of its own**: a slot
knows all tokens, those after the query too. Here every block of L tokens of a document is projected
onto r slots, by the same E and F:

    k~_s = normalize(sum over i < L of E_(s,i) k_(b L + i))
    v~_s = sum over i < L of F_(s,i) v_(b L + i)

and a query at position t attends, in one softmax, to the tokens of its window, t - W < j <= t, and
to the slots of the last N blocks that ended before the window, (b + 1) L <= t - W + 1. To the
scores of slots a learned bias per head is added. The up to L - 1 tokens between the last of these
blocks and the window are not seen.

Keys and values of the last W + (N + 1) L tokens are kept as they are and projected anew in every
call: else no gradient would ever reach E and F, which the loss of every later segment does here.
None reaches the kept keys and values, as in a cache. For reading alone the slots would be enough.

**Deviations**: causal and in blocks; exact attention within the window; E and F of a head are its
own, and start as means over neighboring tokens instead of at random; projected keys are normalized,
as all keys of this model are.

Shapes: B rows, H heads, T tokens of a call, C kept tokens, N blocks, L tokens and r slots of a
block, D head_dim.
"""

from __future__ import annotations

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


class Linformer(AttentionLayer):
    """Attention to the window and to projections of the blocks before it."""

    def __init__(
        self,
        config: ModelConfig,
        has_memory: bool,
        context: int = 4096,
        block_len: int = 128,
        num_slots: int = 16,
    ) -> None:
        """Make E and F, which start as means over block_len / num_slots tokens.

        Args:
            config: of the model.
            has_memory: as for other layers; none is read.
            context: tokens before the window that are seen, in whole blocks.
            block_len: L, at most the window and one.
            num_slots: r, which divides it.
        """
        super().__init__(config, has_memory)
        assert context % block_len == 0
        assert block_len <= config.window + 1
        assert block_len % num_slots == 0
        self.block_len, self.num_blocks = block_len, context // block_len
        self.far_bias = make_far_bias(config.num_heads)
        merged = block_len // num_slots
        means = torch.eye(num_slots).repeat_interleave(merged, 1) / merged
        self.project_keys, self.project_values = (
            nn.Parameter(means.repeat(config.num_heads, 1, 1)) for _ in range(2)
        )

    @property
    def num_kept(self) -> int:
        """C; which of them count follows from the position."""
        return self.config.window + (self.num_blocks + 1) * self.block_len

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
        keys = torch.cat([cache.keys, new.keys], 2)
        values = torch.cat([cache.values, new.values], 2)
        attended, log_sum = attend_window(self, new, keys, values, layout)
        # Blocks that a query may see: those that ended before its window.
        ended = (layout.position - self.config.window + 1) // self.block_len
        if bool((ended > 0).any()):
            oldest = ended[:, 0] - self.num_blocks
            first = (ended - self.num_blocks).clamp(min=0) - oldest.unsqueeze(1)
            last = ended - oldest.unsqueeze(1)
            column = oldest * self.block_len - layout.position[:, 0] + self.num_kept
            num_blocks = self.num_blocks + -(-(x.shape[1] - 1) // self.block_len)
            length = num_blocks * self.block_len
            # The kept ones have no gradient, and none but kept ones have left the window.
            slot_keys, slot_values = (
                self._project_blocks(gather_spans(part.detach(), column, length), weights)
                for part, weights in ((keys, self.project_keys), (values, self.project_values))
            )
            num_slots = self.project_keys.shape[1]
            far, far_log_sum = attend_to_slots(
                new.scaled_queries,
                normalize(slot_keys),
                slot_values,
                first * num_slots,
                last * num_slots,
            )
            near = attended, log_sum
            attended = join_far(near, (far, far_log_sum), self.far_bias, last > first)
        kept = Entries(*(keep_recent(part, self.num_kept, layout) for part in (keys, values)))
        output = self.project_output(attended)
        return AttentionResult(output, kept, None, new.recent, None, None)

    def _project_blocks(self, x: Tensor, weights: Tensor) -> Tensor:
        """(B, H, N L, D) by weights (H, r, L): (B, H, N r, D)."""
        blocks = x.unflatten(2, (-1, self.block_len))
        return torch.matmul(weights.to(x.dtype).unsqueeze(1), blocks).flatten(2, 3)
