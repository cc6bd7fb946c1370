"""What a search found, and where in the store it lies.

Shapes: B rows, H heads, T queries, k neighbors, D head_dim.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from memorizing.errors import StateError
from memorizing.knn import Neighbors


@dataclass(frozen=True)
class Retrieved:
    """The neighbors of every query, and the stored entries by reference: nothing is copied.

    What is read through it is right as long as nothing was written; `check_unchanged` says so.
    """

    neighbors: Neighbors
    stored_keys: Tensor
    """(lines, D): all stored keys, one line each."""
    stored_values: Tensor
    """(lines, D)."""
    key_lines: Tensor
    """(B, H, T, k) int64: where the found keys are."""
    value_lines: Tensor
    """(B, H, T, k) int64: other than `key_lines` where values are shuffled on purpose."""
    num_changes: Tensor
    """() int64 on the CPU: the memory's own counter of what was done to it."""
    num_changes_then: Tensor
    """() int64 on the CPU: its value when the search was made."""

    def fetch_keys(self) -> Tensor:
        """The keys (B, H, T, k, D), a copy in the dtype of the memory."""
        return self._fetch(self.stored_keys, self.key_lines)

    def fetch_values(self) -> Tensor:
        """The values (B, H, T, k, D), a copy."""
        return self._fetch(self.stored_values, self.value_lines)

    @staticmethod
    def _fetch(stored: Tensor, lines: Tensor) -> Tensor:
        return stored.index_select(0, lines.flatten()).view(*lines.shape, stored.shape[1])

    def check_unchanged(self) -> None:
        """Refuse to read entries that may not be those that were found.

        Raises:
            StateError: the memory was written, reset or loaded since the search.
        """
        if not torch.equal(self.num_changes, self.num_changes_then):
            raise StateError(
                "the memory was written or reset between the forward pass and its backward pass, "
                "which reads the retrieved entries again; call commit() and start_documents() "
                "after backward()"
            )
