"""T5's relative position bias (Raffel et al. 2020), in local attention only (paper, section 3)."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

_LEAST_BLOCK = 32
"""Queries of a block, where a share of the window is less."""


def choose_block_len(window: int, device: torch.device) -> int:
    """Queries that local attention takes together: a quarter of the window, or all of it.

    On a CPU fewer queries see fewer keys in vain; a GPU would rather start fewer operations.
    """
    return max(_LEAST_BLOCK, window // 4 if device.type == "cpu" else window)


def compute_buckets(distances: Tensor, num_buckets: int, max_distance: int) -> Tensor:
    """Bucket of each distance query - key >= 0: T5's causal buckets.

    Half of the buckets hold one distance each, the other half grow logarithmically up to
    `max_distance`; all that is farther shares the last.
    """
    num_exact = num_buckets // 2
    ratio = distances.clamp(min=num_exact).double() / num_exact
    large = (
        num_exact
        + (ratio.log() / math.log(max_distance / num_exact) * (num_buckets - num_exact)).long()
    )
    return torch.where(distances < num_exact, distances, large.clamp(max=num_buckets - 1))


class PositionBias(nn.Module):
    """A learned bias per head and bucket of distances, 0 at the start."""

    def __init__(self, num_heads: int, num_buckets: int, max_distance: int, window: int) -> None:
        """Make a table for distances from 0 to window - 1."""
        super().__init__()
        self.table = nn.Parameter(torch.zeros(num_heads, num_buckets))
        self.window = window
        self.num_buckets, self.max_distance = num_buckets, max_distance
        self._buckets: Tensor | None = None

    def _compute_by_distance(self) -> Tensor:
        if self._buckets is None or self._buckets.device != self.table.device:
            # Kept for training too, where a tensor made in inference mode would be of no use.
            with torch.inference_mode(False):
                # By one processor's logarithm, whatever the device: bounds of buckets are close.
                distances = torch.arange(self.window, device="cpu")
                buckets = compute_buckets(distances, self.num_buckets, self.max_distance)
                self._buckets = buckets.to(self.table.device)
        # index_select: its backward is a plain index_add, unlike that of a general gather.
        return self.table.index_select(1, self._buckets)

    def forward(self, num_queries: int, dtype: torch.dtype) -> Tensor:
        """Bias (H, R, W + R) of any block of R neighboring queries, for `attend_locally`.

        R is at most `num_queries`. The keys are those from W before the block's first query to its
        last, for a window of W; -inf outside the causal window.
        """
        block_len = min(num_queries, choose_block_len(self.window, self.table.device))
        by_distance = self._compute_by_distance()
        masked = by_distance.new_full((by_distance.shape[0], block_len), -math.inf)
        # From the farthest key of the last query to the (masked) future of the first.
        line = torch.cat([masked, by_distance.flip(1), masked[:, :-1]], dim=1)
        return _ExpandDiagonals.apply(line.to(dtype), block_len, self.window + block_len)


class _ExpandDiagonals(torch.autograd.Function):
    """(H, S + T - 1) to (H, T, S): result[h, i, j] = line[h, j + T - 1 - i]."""

    @staticmethod
    def forward(ctx, line: Tensor, num_queries: int, num_keys: int) -> Tensor:
        ctx.shape = (line.shape[0], num_queries, num_keys)
        # Contiguous, because it is added to the scores of every row and block.
        return line.unfold(1, num_keys, 1).flip(1).contiguous()

    @staticmethod
    def backward(ctx, *grads: Tensor) -> tuple[Tensor, None, None]:
        heads, queries, keys = ctx.shape
        padded = nn.functional.pad(grads[0].flip(1), (0, queries)).view(heads, -1)
        width = keys + queries - 1
        return padded[:, : queries * width].view(heads, queries, width).sum(1), None, None
