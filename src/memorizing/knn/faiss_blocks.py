"""Faiss behind `SealedIndex`: brute force, inverted lists and graphs, all by inner product.

Keys are normalized in this library's models, so that inner product and cosine order them alike;
keys that are not are searched by inner product as well, with less recall in graphs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from memorizing.errors import ConfigError, StateError
from memorizing.index_settings import (
    FaissFlatSettings,
    FaissFp16Settings,
    FaissHnswSettings,
    FaissInt8Settings,
    FaissIvfSettings,
    SealedSettings,
)
from memorizing.knn.blocks import BlockLibrary, KeyBlock, import_package
from memorizing.knn.query_routing import learn_routing

_FEWEST_KEYS_A_LIST = 39
"""Below it Faiss warns that k-means has too few points."""
_MOST_SAMPLES_A_LIST = 64
"""k-means learns from a sample: with four times as many, recall was the same to 0.002."""
_FP16_MAX = 65504.0
_FILE = "index.faiss"


class FaissLibrary(BlockLibrary):
    """One kind of Faiss index, chosen by the class of the settings.

    Flat, fp16 and int8 blocks copy the keys, which takes less time than reading a file of them, so
    they are not saved. Inverted lists are trained by k-means on the sphere, as Faiss advises for
    inner products; a block has at most one list per 39 keys, whatever the settings say.
    """

    def __init__(self, settings: SealedSettings) -> None:
        """Import Faiss.

        Raises:
            IndexUnavailableError: faiss-cpu is not installed.
        """
        self._settings = settings
        self._faiss = import_package("faiss", "faiss")
        self.is_saved = isinstance(settings, (FaissIvfSettings, FaissHnswSettings))
        self.trains_on_queries = (
            isinstance(settings, FaissIvfSettings) and settings.train_on_queries
        )

    def build(self, keys: np.ndarray, queries: np.ndarray | None) -> KeyBlock:
        """As `BlockLibrary.build`. Inverted lists learn from queries which lists to search."""
        if not isinstance(self._settings, (FaissFlatSettings, FaissInt8Settings)):
            keys = keys.clip(-_FP16_MAX, _FP16_MAX)
        index = self._make_empty(*keys.shape)
        index.train(keys)
        index.add(keys)
        if queries is not None:
            self._learn_routing(index, keys, queries)
        return FaissBlock(index, self._faiss, self._settings)

    def restore(self, files: Mapping[str, bytes], num_keys: int, dim: int) -> KeyBlock:
        """As `BlockLibrary.restore`."""
        index = self._faiss.deserialize_index(np.frombuffer(files[_FILE], dtype=np.uint8))
        if (index.ntotal, index.d) != (num_keys, dim):
            raise StateError(
                f"the Faiss index holds {index.ntotal} keys of length {index.d}, expected "
                f"{num_keys} of {dim}; build the index again from the keys"
            )
        return FaissBlock(index, self._faiss, self._settings)

    def _learn_routing(self, index: Any, keys: np.ndarray, queries: np.ndarray) -> None:
        """Replace the centers by which lists are chosen; the keys stay in their lists."""
        centers = index.quantizer.reconstruct_n(0, index.nlist)
        cells = index.quantizer.search(keys, 1)[1][:, 0]
        vectors = learn_routing(centers, keys, cells, queries)
        index.quantizer.reset()
        index.quantizer.add(vectors)

    def _make_empty(self, num_keys: int, dim: int) -> Any:
        faiss, settings = self._faiss, self._settings
        metric, kinds = faiss.METRIC_INNER_PRODUCT, faiss.ScalarQuantizer
        if isinstance(settings, FaissFlatSettings):
            return faiss.IndexFlatIP(dim)
        if isinstance(settings, FaissFp16Settings):
            return faiss.IndexScalarQuantizer(dim, kinds.QT_fp16, metric)
        if isinstance(settings, FaissInt8Settings):
            return faiss.IndexScalarQuantizer(dim, kinds.QT_8bit, metric)
        if isinstance(settings, FaissIvfSettings):
            wanted = settings.num_lists or 4 * math.isqrt(num_keys)
            num_lists = max(1, min(wanted, num_keys // _FEWEST_KEYS_A_LIST))
            index = faiss.IndexIVFScalarQuantizer(
                faiss.IndexFlatIP(dim), dim, num_lists, kinds.QT_fp16, metric, False
            )
            index.cp.spherical = True
            # With this few keys there is one list, and nothing to warn of.
            index.cp.min_points_per_centroid = 1
            index.cp.max_points_per_centroid = _MOST_SAMPLES_A_LIST
            return index
        if isinstance(settings, FaissHnswSettings):
            index = faiss.IndexHNSWSQ(dim, kinds.QT_fp16, settings.num_links, metric)
            index.hnsw.efConstruction = settings.ef_construction
            return index
        raise ConfigError(f"Faiss has no index for {settings}")


class FaissBlock(KeyBlock):
    """A Faiss index and how it is searched."""

    def __init__(self, index: Any, faiss: Any, settings: SealedSettings) -> None:
        """Keep them."""
        self._index = index
        self._faiss = faiss
        self._settings = settings

    def search(self, queries: np.ndarray, num_candidates: int) -> tuple[np.ndarray, np.ndarray]:
        """As `KeyBlock.search`."""
        parameters = None
        if isinstance(self._settings, FaissIvfSettings):
            probes = min(self._settings.num_probes, self._index.nlist)
            parameters = self._faiss.SearchParametersIVF(nprobe=probes)
        elif isinstance(self._settings, FaissHnswSettings):
            width = max(self._settings.ef_search, num_candidates)
            parameters = self._faiss.SearchParametersHNSW(efSearch=width)
        scores, found = self._index.search(queries, num_candidates, params=parameters)
        return found, scores

    def dump(self) -> dict[str, bytes]:
        """As `KeyBlock.dump`."""
        return {_FILE: self._faiss.serialize_index(self._index).tobytes()}
