"""Making an index of a full memory, as an application would before it only reads."""

from __future__ import annotations

import gc
import time
from dataclasses import dataclass

import psutil
from torch import Tensor

from memorizing.errors import ConfigError
from memorizing.index_settings import FaissIvfSettings, IndexSettings
from memorizing.knn import KeyIndex, StoredKeys, make_index


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
