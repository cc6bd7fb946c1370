"""Indexes for measurements: built beforehand, and with another one in front that knows queries."""

from __future__ import annotations

import gc
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
from torch import Tensor

from memorizing.errors import ConfigError
from memorizing.index_settings import FaissIvfSettings, IndexSettings
from memorizing.knn import KeyIndex, Neighbors, StoredKeys, make_index


class DelegatingIndex(KeyIndex, ABC):
    """Passes everything on to another index; for which queries it searches, a subclass says."""

    def __init__(self, index: KeyIndex) -> None:
        """Take the index that answers."""
        super().__init__(index.settings)
        self.index = index

    @abstractmethod
    def replace(self, queries: Tensor) -> Tensor:
        """The queries (B, H, T, D) that are searched for in the place of these."""

    def search(self, queries: Tensor, *arguments: Any, **options: Any) -> Neighbors:
        """As `KeyIndex.search`, for the queries that `replace` gives."""
        return self.index.search(self.replace(queries), *arguments, **options)

    def append(self, stored: StoredKeys) -> None:
        """As `KeyIndex.append`."""
        self.index.append(stored)

    def reset(self, rows: Sequence[int]) -> None:
        """As `KeyIndex.reset`."""
        self.index.reset(rows)

    def seal(self, stored: StoredKeys) -> None:
        """As `KeyIndex.seal`."""
        self.index.seal(stored)

    def save(self, folder: Path, stored: StoredKeys) -> None:
        """As `KeyIndex.save`."""
        self.index.save(folder, stored)

    def load(self, folder: Path, stored: StoredKeys) -> None:
        """As `KeyIndex.load`."""
        self.index.load(folder, stored)


class RecordingIndex(DelegatingIndex):
    """Passes everything on to another index, and keeps the queries."""

    def __init__(self, index: KeyIndex) -> None:
        """Take the index that answers."""
        super().__init__(index)
        self.queries: list[Tensor] = []
        """(B, H, T, D) of every search, in order."""

    def replace(self, queries: Tensor) -> Tensor:
        """The same; a copy of them is kept."""
        self.queries.append(queries.detach().clone())
        return queries


class ReplayingIndex(DelegatingIndex):
    """Passes everything on to another index, but the queries: those are replayed one by one.

    Graphs and lists are quicker or slower with the distribution of keys and queries, and a model
    with random weights asks for nothing like what a trained one does. So a benchmark lets it
    compute its queries as ever and searches for recorded ones: every other operation is the
    model's own, the fetching of what was found included.
    """

    def __init__(self, index: KeyIndex, queries: Tensor) -> None:
        """Take the index that answers, and queries (H, T, D), replayed in a circle."""
        super().__init__(index)
        self.queries = queries
        self.num_replayed = 0

    def replace(self, queries: Tensor) -> Tensor:
        """The next recorded query, for one (1, H, 1, D)."""
        place = self.num_replayed % self.queries.shape[1]
        replayed = self.queries[:, place : place + 1].unsqueeze(0)
        assert queries.shape == replayed.shape, (queries.shape, replayed.shape)
        self.num_replayed += 1
        return replayed


@dataclass(frozen=True)
class BuiltIndex:
    """An index of all entries, and what it took to make it."""

    index: KeyIndex
    seconds: float
    """Of `append` and `seal`. An index of blocks builds them when appending, and one block of all
    when sealing: with a `block_len` of as many entries as there are it builds only once."""
    resident_bytes: int
    """Growth of the process's resident memory."""


def build_index(settings: IndexSettings, stored: StoredKeys, queries: Tensor) -> BuiltIndex:
    """Make an index, tell it of all entries and seal it.

    Args:
        settings: which index.
        stored: keys of one row.
        queries: (H, T, D), not those that will be timed: for an index that is trained on queries.

    Raises:
        ConfigError: the index is trained on queries, and there are none.
        IndexUnavailableError: the index needs a package that is not installed.
    """
    gc.collect()
    process = psutil.Process()
    resident = process.memory_info().rss
    start = time.perf_counter()
    index = make_index(settings)
    if isinstance(settings, FaissIvfSettings) and settings.train_on_queries:
        from memorizing.knn.sealed import SealedIndex

        assert isinstance(index, SealedIndex)
        if not queries.shape[1]:
            raise ConfigError(
                f"{settings} is trained on queries that are not timed, and there are none; record "
                "more queries, or search fewer"
            )
        index.observe_queries(queries.unsqueeze(0))
    index.append(stored)
    index.seal(stored)
    seconds = time.perf_counter() - start
    gc.collect()
    return BuiltIndex(index, seconds, max(0, process.memory_info().rss - resident))
