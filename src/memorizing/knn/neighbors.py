"""The typed result of every search."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Neighbors:
    """The nearest entries of every query. B rows, H heads, T queries, k neighbors, best first.

    Where a memory holds fewer than k entries, `valid` is False, the score -inf and the slot 0.
    """

    slots: Tensor
    """(B, H, T, k) int64: where the entries are stored."""
    scores: Tensor
    """(B, H, T, k): inner products of queries and stored keys, in the dtype of the keys; larger is
    nearer."""
    valid: Tensor
    """(B, H, T, k) bool."""
