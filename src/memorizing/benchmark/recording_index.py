"""An index that keeps every query it is asked."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from memorizing.benchmark.delegating_index import DelegatingIndex
from memorizing.knn import KeyIndex, Neighbors, StoredKeys


class RecordingIndex(DelegatingIndex):
    """Passes everything on to another index, and keeps the queries."""

    def __init__(self, index: KeyIndex) -> None:
        """Take the index that answers."""
        super().__init__(index)
        self.queries: list[Tensor] = []
        """(B, H, T, D) of every search, in order."""

    def search(
        self,
        queries: Tensor,
        stored: StoredKeys,
        num_neighbors: int,
        *,
        num_hidden: Tensor | None = None,
        key_rows: Sequence[int | None] | None = None,
    ) -> Neighbors:
        """As `KeyIndex.search`; a copy of the queries is kept."""
        self.queries.append(queries.detach().clone())
        return self.index.search(
            queries, stored, num_neighbors, num_hidden=num_hidden, key_rows=key_rows
        )
