"""Which heads of a memory layer read it: nothing is searched for the others.

A text's own memory has nothing but the heads of keys that are read; a memory that documents were
read into has all of them, so that it may be opened with other gates.

Shapes: B rows, H heads of queries, H_kv heads of keys, T tokens, D head_dim.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class OpenHeads:
    """Heads of queries that read, and those of keys that they read.

    A search is asked for equally many heads of queries per head of keys, those of a key head side
    by side. Where fewer of a group read than of another, its first is asked for again.
    """

    key_heads: tuple[int, ...]
    """Heads of keys that are searched, ascending."""
    num_key_heads: int
    """H_kv."""
    heads: Tensor | None
    """(H_open,) int64: heads of queries that read, ascending; None is all, in their places."""
    asked: Tensor
    """(P,) int64: the head of queries at each place of a search."""
    places: Tensor
    """(H_open,) int64: where in `asked` each of `heads` stands."""
    keys: Tensor
    """(K,) int64: `key_heads`."""

    @property
    def is_any(self) -> bool:
        """Whether any head reads."""
        return len(self.places) > 0

    @property
    def has_all_keys(self) -> bool:
        """Whether all heads of keys are searched."""
        return len(self.key_heads) == self.num_key_heads

    def ask(self, queries: Tensor) -> Tensor:
        """What the search is asked (B, P, T, D), of queries (B, H, T, D)."""
        return queries if self.heads is None else queries.index_select(1, self.asked)

    def take_keys(self, entries: Tensor) -> Tensor:
        """Keys or values (B, K, T, D) that are stored, of those of all heads (B, H_kv, T, D)."""
        return entries if self.has_all_keys else entries.index_select(1, self.keys)

    def keep(self, found: Tensor) -> Tensor:
        """Of what was found (B, P, ...), that of the heads that read (B, H_open, ...)."""
        return found if self.heads is None else found.index_select(1, self.places)


def plan_open_heads(
    is_open: Sequence[bool],
    num_key_heads: int,
    device: torch.device,
    *,
    keep_keys: bool = False,
) -> OpenHeads:
    """Plan for the heads of a layer.

    Args:
        is_open: of every head of queries, whether it reads.
        num_key_heads: H_kv, of which each serves equally many heads of queries, side by side.
        device: where the layer computes.
        keep_keys: search all heads of keys, also those that no head reads.
    """
    num_groups = len(is_open) // num_key_heads
    groups = [
        [head for head in range(first, first + num_groups) if is_open[head]]
        for first in range(0, len(is_open), num_groups)
    ]
    heads = [head for group in groups for head in group]
    key_heads = tuple(key for key, group in enumerate(groups) if group or keep_keys)
    num_asked = max(map(len, groups))
    asked, places = [], []
    for key in key_heads:
        group = groups[key]
        places += range(len(asked), len(asked) + len(group))
        first = group[0] if group else key * num_groups
        asked += group + [first] * (num_asked - len(group))
    # Made in inference mode they could not be used with gradients outside of it.
    with torch.inference_mode(False):
        tensors = [
            torch.tensor(numbers, dtype=torch.int64, device=device)
            for numbers in (heads, asked, places, key_heads)
        ]
    return OpenHeads(
        key_heads,
        num_key_heads,
        None if all(is_open) else tensors[0],
        *tensors[1:],
    )
