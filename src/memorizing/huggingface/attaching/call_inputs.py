"""What a call of a model with memory is given: rows, tokens, and which of them are padding.

Shapes: B rows, T tokens of the call.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from memorizing.errors import StateError


@dataclass(frozen=True)
class CallInputs:
    """What a call is given."""

    num_rows: int
    num_tokens: int
    start: int
    """Columns that were seen before."""
    mask: Any
    first_valid: Tensor | None
    """(B,): column of the first token of each row; None is 0."""

    @property
    def num_columns(self) -> int:
        """Seen after the call."""
        return self.start + self.num_tokens

    def list_valid(self) -> Tensor:
        """(B, T) bool on the CPU: tokens that are not padding."""
        if self.mask is None:
            return torch.ones(self.num_rows, self.num_tokens, dtype=torch.bool)
        return self.mask[:, -self.num_tokens :].bool().cpu()

    def check_mask(self) -> None:
        """Refuse a mask that does not say where tokens are.

        Raises:
            StateError: with its shape, and the one that is needed.
        """
        mask, expected = self.mask, (self.num_rows, self.num_columns)
        found = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
        if mask is not None and found != expected:
            raise StateError(
                f"attention_mask is {found}; with a memory open, or past the window, it must be "
                f"(rows, tokens seen and given) = {expected}: from it the memory knows what is "
                "padding"
            )

    def check_positions(self, position_ids: Tensor | None) -> None:
        """Refuse several texts in one row.

        Raises:
            StateError: positions (B or 1, T) that do not count on.
        """
        if position_ids is None or self.mask is not None or self.num_tokens < 2:
            return  # a row with a mask has positions of its own for padding
        if not bool((position_ids.diff(dim=-1) == 1).all()):
            raise StateError(
                "position_ids do not count on from token to token, as where several texts are "
                "packed into a row; give every text a row of its own"
            )
