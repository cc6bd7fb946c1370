"""An index that keeps every query it is asked."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from memorizing.knn import KeyIndex, Neighbors, StoredKeys


class RecordingIndex(KeyIndex):
    """Passes everything on to another index, and keeps the queries."""

    def __init__(self, index: KeyIndex) -> None:
        """Take the index that answers."""
        super().__init__(index.settings)
        self.index = index
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

    def append(self, stored: StoredKeys) -> None:
        """As `KeyIndex.append`."""
        self.index.append(stored)

    def reset(self, rows: Sequence[int]) -> None:
        """As `KeyIndex.reset`."""
        self.index.reset(rows)

    def seal(self, stored: StoredKeys) -> None:
        """As `KeyIndex.seal`."""
        self.index.seal(stored)

    def save(self, folder: Path) -> None:
        """As `KeyIndex.save`."""
        self.index.save(folder)

    def load(self, folder: Path, stored: StoredKeys) -> None:
        """As `KeyIndex.load`."""
        self.index.load(folder, stored)
