"""What a search found, and where in the store it lies.

Shapes: B rows, H heads, T queries, k neighbors, D head_dim.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

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
    """(B, H, T, k) int64: `key_lines`, or others where values are shuffled on purpose."""
    num_changes: Tensor
    """(B,) or () int64 on the CPU: the memory's own counter of what was done to it."""
    num_changes_then: Tensor
    """Its value when the search was made."""
    tokens: Tensor | None = None
    """(B, H, T, k) int64: of which tokens the found values are, where the memory keeps that."""

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


def keep_best(parts: Sequence[Retrieved], num_neighbors: int) -> tuple[Retrieved, ...]:
    """Of what was found in several stores, keep the k best of every query in all of them together.

    Each store was searched for its own k best (or all it has). What is not among the k best of all
    becomes invalid, so that one softmax over all parts is that over the best k. Of equal scores,
    which have the rounding of the stores' dtypes, the one in the later part wins, and within a part
    the one that its search placed first: put older stores first, and the newest wins.

    Args:
        parts: of the same queries; (B, H, T, any number) each.
        num_neighbors: k.

    Returns:
        As many parts, in their order. Columns in which no query keeps anything are left out, but
        for the first of each part.
    """
    if not parts:
        return ()
    found = [part.neighbors for part in reversed(parts)]
    dtype = torch.float32
    for one in found:
        dtype = torch.promote_types(dtype, one.scores.dtype)
    scores = torch.cat(
        [one.scores.to(dtype).masked_fill(~one.valid, -torch.inf) for one in found], -1
    )
    last = scores.topk(min(num_neighbors, scores.shape[-1]), dim=-1).values[..., -1:]
    above, equal = scores > last, (scores == last) & (scores > -torch.inf)
    num_free = num_neighbors - above.sum(-1, keepdim=True)
    kept = above | (equal & (equal.cumsum(-1) <= num_free))
    widths = [one.scores.shape[-1] for one in found]
    # One wait for a GPU, however many parts there are.
    used = kept.flatten(0, -2).any(0).cpu().split(widths)
    masks = kept.split(widths, dim=-1)
    return tuple(
        _keep(part, mask, count_columns(columns))
        for part, mask, columns in zip(parts, masks[::-1], used[::-1], strict=True)
    )


def count_columns(used: Tensor) -> int:
    """Of columns (n,) bool, those up to the last that is used; at least one."""
    return max((place for place, is_used in enumerate(used.tolist(), 1) if is_used), default=1)


def _keep(part: Retrieved, kept: Tensor, width: int) -> Retrieved:
    """Only the neighbors where `kept` (B, H, T, k) is True; none behind column `width` is.

    Found entries stand best first, so that what is kept stands first.
    """
    kept = kept[..., :width]
    found = part.neighbors
    neighbors = Neighbors(
        found.slots[..., :width].masked_fill(~kept, 0),
        found.scores[..., :width].masked_fill(~kept, -torch.inf),
        kept,
    )
    # What is left out weighs 0; read in its place is what is read anyway.
    lines = part.key_lines[..., :width]
    key_lines = value_lines = torch.where(kept, lines, lines[..., :1])
    if part.value_lines is not part.key_lines:
        lines = part.value_lines[..., :width]
        value_lines = torch.where(kept, lines, lines[..., :1])
    return replace(part, neighbors=neighbors, key_lines=key_lines, value_lines=value_lines)
