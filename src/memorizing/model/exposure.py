"""Crossbatch: a memory layer sees keys and values of earlier segments *with* gradient, and others'.

Focused Transformer (Tworkowski et al. 2023, section 3.2). Entries of a memory take no gradient, so
nothing but local attention teaches keys to be found from far away. In training, the entries of the
previous segments of the same step can be shown to the memory layer directly: then queries, keys
and values learn to meet across segments. Those of other rows are shown beside them as negatives:
then keys learn not to be mistaken for another document's.

Shapes: B rows, H heads, T queries, n entries of a row, D head_dim.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from memorizing.devices import send


@dataclass(frozen=True)
class Exposed:
    """Entries of earlier segments of this step, which are not in the memory yet."""

    keys: Tensor
    """(B, H, n, D), with gradient."""
    values: Tensor
    valid: Tensor
    """(B, n) bool on the CPU: entries that are not padding."""
    num_rows: int = 1
    """Rows whose entries each row sees: its own, and of the `num_rows` - 1 rows after it."""

    def __post_init__(self) -> None:
        """Refuse more rows than there are."""
        assert 1 <= self.num_rows <= self.keys.shape[0]


def join_exposed(parts: Sequence[Exposed], num_rows: int) -> Exposed:
    """The entries of several segments, oldest first, seen from `num_rows` rows."""
    return Exposed(
        torch.cat([part.keys for part in parts], 2),
        torch.cat([part.values for part in parts], 2),
        torch.cat([part.valid for part in parts], 1),
        num_rows,
    )


def attend_to_exposed(
    queries: Tensor, exposed: Exposed, num_hidden: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """softmax(Q K^T) V over all exposed entries of a row and of the rows after it.

    Args:
        queries: (B, H, T, D), scaled.
        exposed: what is seen; each row has one valid entry at least.
        num_hidden: (B, T) on the CPU: how many of the newest *own* entries a query must not see.

    Returns:
        (B, H, T, D), and the log-sum-exp of the scores (B, H, T). Gradients flow into everything.
    """
    shifts = range(exposed.num_rows)
    keys, values = (
        torch.cat([part.roll(-shift, 0) for shift in shifts], 2)
        for part in (exposed.keys, exposed.values)
    )
    num_own = exposed.keys.shape[2]
    device = queries.device
    seen = send(torch.cat([exposed.valid.roll(-shift, 0) for shift in shifts], 1), device)
    mask = seen[:, None, None, :].expand(-1, 1, queries.shape[2], -1)
    if num_hidden is not None:
        # 1 is the newest; padding is as old as what follows it, and masked already.
        age = exposed.valid.flip(1).cumsum(1).flip(1).unsqueeze(1)
        own = send(age > num_hidden.unsqueeze(-1), device)
        mask = torch.cat([mask[..., :num_own] & own.unsqueeze(1), mask[..., num_own:]], -1)
    scores = torch.matmul(queries, keys.transpose(-1, -2))
    scores = scores if scores.dtype == torch.float64 else scores.float()
    # Finite, so that a query that sees nothing has no NaN; its log-sum-exp is -inf nearly.
    scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    weights = torch.softmax(scores, -1).to(values.dtype)
    return torch.matmul(weights, values), torch.logsumexp(scores, -1)
