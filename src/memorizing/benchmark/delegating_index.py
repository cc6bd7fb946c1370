"""An index in front of another one."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from memorizing.knn import KeyIndex, StoredKeys


class DelegatingIndex(KeyIndex):
    """Passes everything on to another index; what it does with searches, a subclass says."""

    def __init__(self, index: KeyIndex) -> None:
        """Take the index that answers."""
        super().__init__(index.settings)
        self.index = index

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
