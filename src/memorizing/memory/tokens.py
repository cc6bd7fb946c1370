"""Of which tokens the entries of a memory are: a ring beside those of keys and values.

Shapes: B rows, H heads, T queries, k neighbors.
"""

from __future__ import annotations

import torch
from torch import Tensor

from memorizing.errors import StateError


def make_tokens(num_rows: int, capacity: int, device: torch.device | str | None = None) -> Tensor:
    """Tokens (B, capacity) int32 of entries, none written yet."""
    return torch.zeros(num_rows, capacity, dtype=torch.int32, device=device)


def check_tokens(tokens: Tensor | None, ring: Tensor | None, num_new: int) -> None:
    """Refuse tokens where a memory keeps none, no tokens where it does, and another number of them.

    Raises:
        StateError: with what was given.
    """
    seen = None if tokens is None else tuple(tokens.shape)
    expected = None if ring is None else (len(ring), num_new)
    if seen != expected:
        raise StateError(
            f"cannot append tokens of shape {seen}; this memory takes "
            + ("none: it keeps no tokens" if expected is None else f"{expected}: (rows, n)")
        )


def write_tokens(ring: Tensor, tokens: Tensor, valid: Tensor | None, num_appended: Tensor) -> None:
    """Write tokens (B, n) after the `num_appended` (B,) of each row. In place.

    `valid` (B, n) bool on the CPU says which of them are entries; None is all.
    """
    capacity = ring.shape[1]
    for row, num_before in enumerate(num_appended.tolist()):
        new = tokens[row]
        if valid is not None:
            new = new[valid[row].nonzero().squeeze(-1).to(new.device, non_blocking=True)]
        places = torch.arange(num_before, num_before + len(new), device=ring.device)[-capacity:]
        ring[row, places % capacity] = new[-capacity:].to(ring.dtype)


def take_tokens(ring: Tensor, slots: Tensor, rows: Tensor) -> Tensor:
    """Tokens int64, of slots (B, H, T, k) of the rows (B,) of a ring (R, capacity)."""
    first = (rows * ring.shape[1]).to(slots.device, non_blocking=True).view(-1, 1, 1, 1)
    return ring.flatten()[slots + first].long()
