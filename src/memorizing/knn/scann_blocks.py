"""ScaNN behind `SealedIndex`: a tree of partitions, then codes of 4 bits for two dimensions.

Guo et al. 2020, "Accelerating Large-Scale Inference with Anisotropic Vector Quantization".
"""

from __future__ import annotations

import contextlib
import os
import re
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch

from memorizing.index_settings import ScannSettings
from memorizing.knn.blocks import BlockLibrary, KeyBlock, import_package

_FEWEST_KEYS_A_LEAF = 50
"""ScaNN merges smaller partitions."""
_DIMS_PER_CODE = 2
_FEWEST_QUERIES_FOR_THREADS = 64
_ANISOTROPY = 0.2
"""What ScaNN's documentation advises for normalized vectors."""

_LOG_LINE = re.compile(rb"(?:[IW]\d{4} \d|WARNING: All log messages before absl).*")
_LOG_LOCK = threading.Lock()


class ScannLibrary(BlockLibrary):
    """Partitions and codes for blocks of at least two leaves of 50 keys; brute force for smaller.

    ScaNN does not order the candidates by the keys themselves (its `reorder`): `SealedIndex` does
    that with the stored keys, so that ScaNN need not keep a second copy of them.

    Blocks are not saved: ScaNN reads files that can hold code.
    """

    def __init__(self, settings: ScannSettings) -> None:
        """Import ScaNN.

        Raises:
            IndexUnavailableError: scann is not installed.
        """
        self._settings = settings
        self._scann = import_package("scann", "scann").scann_ops_pybind

    def build(self, keys: np.ndarray, queries: np.ndarray | None) -> KeyBlock:
        """As `BlockLibrary.build`."""
        del queries
        threads = torch.get_num_threads()
        builder = self._scann.builder(keys, 1, "dot_product").set_n_training_threads(threads)
        num_leaves = min(self._settings.num_leaves, len(keys) // _FEWEST_KEYS_A_LEAF)
        if num_leaves < 2:
            builder = builder.score_brute_force()
        else:
            builder = builder.tree(
                num_leaves=num_leaves,
                num_leaves_to_search=min(num_leaves, self._settings.leaves_to_search),
                # Random centers are others every time; those of k-means++ have a fixed seed.
                random_init=False,
            ).score_ah(_DIMS_PER_CODE, anisotropic_quantization_threshold=_ANISOTROPY)
        with _hold_back_log():
            return ScannBlock(builder.build(), self._settings)

    def restore(self, arrays: Mapping[str, np.ndarray], keys: np.ndarray) -> KeyBlock:
        """As `BlockLibrary.restore`: built anew."""
        del arrays
        return self.build(keys, None)


class ScannBlock(KeyBlock):
    """A ScaNN searcher."""

    def __init__(self, searcher: Any, settings: ScannSettings) -> None:
        """Keep it."""
        self._searcher = searcher
        self._settings = settings

    def search(
        self, queries: np.ndarray, num_candidates: int, wanted: range
    ) -> tuple[np.ndarray, np.ndarray]:
        """As `KeyBlock.search`: it cannot leave keys out, and finds as many more."""
        num_keys = self._searcher.size()
        many = len(queries) >= _FEWEST_QUERIES_FOR_THREADS and torch.get_num_threads() > 1
        search = self._searcher.search_batched_parallel if many else self._searcher.search_batched
        found, scores = search(
            queries,
            final_num_neighbors=min(num_candidates + num_keys - len(wanted), num_keys),
            leaves_to_search=self._settings.leaves_to_search,
        )
        # What is missing has the score NaN and the number 0.
        missing = np.isnan(scores)
        found = np.where(missing, -1, found.astype(np.int64))
        return found, np.where(missing, np.float32(-np.inf), scores)

    def dump(self) -> dict[str, np.ndarray]:
        """Nothing: see `ScannLibrary`."""
        return {}


@contextlib.contextmanager
def _hold_back_log() -> Iterator[None]:
    """Keep what ScaNN logs about a build (information and warnings) off the standard error.

    It writes to the file descriptor and has no setting for that. Everything else that is written
    meanwhile, by any thread, appears afterwards.
    """
    with _LOG_LOCK, tempfile.TemporaryFile() as held:
        sys.stderr.flush()
        real = os.dup(2)
        os.dup2(held.fileno(), 2)
        try:
            yield
        finally:
            sys.stderr.flush()
            os.dup2(real, 2)
            held.seek(0)
            for line in held:
                if not _LOG_LINE.match(line):
                    os.write(2, line)
            os.close(real)
