"""Indexes that score every key of a row: one loop over the rows for all of them.

Shapes: B rows, H heads, T queries, D head_dim, k neighbors.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from memorizing.knn.index import KeyIndex, StoredKeys, check_queries
from memorizing.knn.neighbors import Neighbors

SearchRow = Callable[[Tensor, StoredKeys, int, int, Tensor | None], tuple[Tensor, Tensor]]
"""Queries (H, T, D), keys, a row of them, k, hidden (T,) -> scores and slots (H, T, k)."""


def search_rows(
    search: SearchRow,
    queries: Tensor,
    stored: StoredKeys,
    num_neighbors: int,
    num_hidden: Tensor | None,
    key_rows: Sequence[int | None] | None,
) -> Neighbors:
    """Search row by row, as every index that scores all keys does; see `KeyIndex.search`."""
    num_rows, num_heads, num_queries, _ = queries.shape
    shape = (num_rows, num_heads, num_queries, num_neighbors)
    keys = stored.keys
    slots = torch.zeros(shape, dtype=torch.int64, device=keys.device)
    scores = torch.full(shape, -math.inf, dtype=keys.dtype, device=keys.device)
    queries = queries.detach().to(keys.dtype)
    check_queries(queries)
    # A search asks for the largest of them, which would be a wait for a GPU in every row.
    num_hidden = None if num_hidden is None else num_hidden.cpu()
    with torch.no_grad():
        for row in range(num_rows):
            source = row if key_rows is None else key_rows[row]
            k = 0 if source is None else min(num_neighbors, stored.sizes[source])
            if source is None or k == 0 or num_queries == 0:
                continue
            hidden = None if num_hidden is None else num_hidden[row]
            scores[row, ..., :k], slots[row, ..., :k] = search(
                queries[row], stored, source, k, hidden
            )
    valid = scores > -math.inf
    # A key that is NaN may take the place of a neighbor; it is not returned.
    return Neighbors(slots.masked_fill_(~valid, 0), scores.masked_fill_(~valid, -math.inf), valid)


class RowIndex(KeyIndex):
    """An index that says how one row is searched."""

    def search(
        self,
        queries: Tensor,
        stored: StoredKeys,
        num_neighbors: int,
        *,
        num_hidden: Tensor | None = None,
        key_rows: Sequence[int | None] | None = None,
    ) -> Neighbors:
        """As `KeyIndex.search`."""
        return search_rows(self._search_row, queries, stored, num_neighbors, num_hidden, key_rows)

    @abstractmethod
    def _search_row(
        self, queries: Tensor, stored: StoredKeys, row: int, k: int, num_hidden: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """As `SearchRow`."""


class KeysOnlyIndex(RowIndex):
    """An index that needs nothing but the keys, so that no change has to be told."""

    def append(self, stored: StoredKeys) -> None:
        """Nothing: the keys are all it needs."""

    def reset(self, rows: Sequence[int]) -> None:
        """Nothing."""

    def seal(self, stored: StoredKeys) -> None:
        """Nothing."""

    def save(self, folder: Path) -> None:
        """Nothing."""

    def load(self, folder: Path, stored: StoredKeys) -> None:
        """Nothing."""
