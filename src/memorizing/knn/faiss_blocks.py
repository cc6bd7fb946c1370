"""Faiss behind `SealedIndex`: brute force, inverted lists and graphs, all by inner product.

What is saved of a block are plain arrays: the cells of its keys, or the links of its graph. Faiss
makes the index from them and the keys. Its own files are not read: they may name other files, and
damaged ones take memory without bound.

Cells are placed by the keys. Queries are distributed differently, so that the center of a cell is
not the best guide to whether it holds their neighbors. Softmax regression on a sample of queries
gives each cell a vector that is (Vecchiato, Lucchese, Nardini and Bruch 2024, "A Learning-to-Rank
Formulation of Clustering-Based Approximate Nearest Neighbor Search"). Placing the cells themselves
by queries, or by queries and keys, lowered the recall at equal work.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch.nn import functional

from memorizing.errors import StateError
from memorizing.index_settings import (
    FaissFlatSettings,
    FaissFp16Settings,
    FaissHnswSettings,
    FaissInt8Settings,
    FaissIvfSettings,
    SealedSettings,
)
from memorizing.knn.blocks import BlockLibrary, KeyBlock, import_package

_FEWEST_KEYS_A_LIST = 39
"""Below it Faiss warns that k-means has too few points."""
_MOST_SAMPLES_A_LIST = 64
"""k-means learns from a sample: with four times as many, recall was the same to 0.002."""
_FP16_MAX = 65504.0
_KINDS: dict[type[SealedSettings], str] = {
    FaissFlatSettings: "Flat",
    FaissFp16Settings: "SQfp16",
    FaissInt8Settings: "SQ8",
}
"""As `faiss.index_factory` calls them."""
_IVF_ARRAYS = ("probes", "cells")
_GRAPH_ARRAYS = ("levels", "offsets", "neighbors", "entry")

_NUM_NEIGHBORS = 32
_NUM_STEPS = 50
_LEARNING_RATE = 0.1
_SHARPNESS = 8.0
"""The mean length of the vectors at the start: softmax of cosines would be flat."""
_TILE_BYTES = 64 * 2**20


class FaissLibrary(BlockLibrary):
    """One kind of Faiss index, chosen by the class of the settings.

    Flat, fp16 and int8 blocks copy the keys, which takes less time than reading a file of them, so
    they are not saved. Inverted lists are cells of k-means; a block has at most one per 39 keys,
    whatever the settings say. Every block is built by one thread, so that it is always the same.
    """

    def __init__(self, settings: SealedSettings) -> None:
        """Import Faiss.

        Raises:
            IndexUnavailableError: faiss-cpu is not installed.
        """
        self._settings = settings
        self._faiss = import_package("faiss", "faiss")
        self.trains_on_queries = (
            isinstance(settings, FaissIvfSettings) and settings.train_on_queries
        )

    def build(self, keys: np.ndarray, queries: np.ndarray | None) -> KeyBlock:
        """As `BlockLibrary.build`. Inverted lists learn from queries which lists to search."""
        with self._use_one_thread():
            if isinstance(self._settings, FaissIvfSettings):
                centers, cells = self._place_cells(keys, self._settings.num_lists)
                probes = centers
                if queries is not None:
                    probes = learn_routing(centers, keys, cells, queries)
                return self._fill_lists(keys, probes, cells)
            index = self._make_empty(keys.shape[1])
            keys = self._clip(keys)
            index.train(keys)
            index.add(keys)
        return FaissBlock(index, self._faiss, self._settings, self._read_graph(index))

    def restore(self, arrays: Mapping[str, np.ndarray], keys: np.ndarray) -> KeyBlock:
        """As `BlockLibrary.restore`."""
        is_list = isinstance(self._settings, FaissIvfSettings)
        names = _IVF_ARRAYS if is_list else _GRAPH_ARRAYS
        if set(arrays) != set(names):
            raise _refuse(f"arrays {sorted(arrays)}, expected {sorted(names)}")
        return (self._restore_lists if is_list else self._restore_graph)(arrays, keys)

    def _place_cells(self, keys: np.ndarray, num_lists: int) -> tuple[np.ndarray, np.ndarray]:
        """Centers (L, D) of k-means, and the nearest of each key (n,)."""
        num_keys, dim = keys.shape
        wanted = num_lists or 4 * math.isqrt(num_keys)
        num_lists = max(1, min(wanted, num_keys // _FEWEST_KEYS_A_LIST))
        clustering = self._faiss.Clustering(dim, num_lists)
        # With this few keys there is one list, and nothing to warn of.
        clustering.min_points_per_centroid = 1
        clustering.max_points_per_centroid = _MOST_SAMPLES_A_LIST
        quantizer = self._faiss.IndexFlatL2(dim)
        clustering.train(keys, quantizer)
        return quantizer.reconstruct_n(0, num_lists), quantizer.search(keys, 1)[1][:, 0]

    def _fill_lists(self, keys: np.ndarray, probes: np.ndarray, cells: np.ndarray) -> KeyBlock:
        """Put keys into the lists of their cells, of which those of `probes` are searched."""
        faiss, dim = self._faiss, keys.shape[1]
        quantizer = faiss.IndexFlatIP(dim)
        quantizer.add(probes)
        assert isinstance(self._settings, FaissIvfSettings)
        is_short = self._settings.num_bits == 8
        kind = faiss.ScalarQuantizer.QT_8bit if is_short else faiss.ScalarQuantizer.QT_fp16
        index = faiss.IndexIVFScalarQuantizer(
            quantizer,
            dim,
            len(probes),
            kind,
            faiss.METRIC_INNER_PRODUCT,
            False,
        )
        keys = self._clip(keys)
        index.train(keys)
        # Lists that grow key by key take half as much memory again as they need.
        codes, order = index.sq.compute_codes(keys), np.argsort(cells, kind="stable")
        ends = np.bincount(cells, minlength=len(probes)).cumsum()
        for number, members in enumerate(np.split(order, ends[:-1])):
            part = codes[members]
            index.invlists.add_entries(
                number, len(members), faiss.swig_ptr(members), faiss.swig_ptr(part)
            )
        index.ntotal = len(keys)
        saved = {"probes": probes, "cells": cells.astype(np.int32)}
        return FaissBlock(index, faiss, self._settings, saved)

    def _restore_lists(self, arrays: Mapping[str, np.ndarray], keys: np.ndarray) -> KeyBlock:
        probes, cells = (arrays[name] for name in _IVF_ARRAYS)
        _check_array("probes", probes, np.float32, (-1, keys.shape[1]))
        _check_array("cells", cells, np.int32, (len(keys),))
        if not len(probes) or not np.isfinite(probes).all():
            raise _refuse("no lists, or such as are NaN or infinite")
        if cells.min() < 0 or cells.max() >= len(probes):
            raise _refuse(f"keys in lists {cells.min()} to {cells.max()} of {len(probes)}")
        with self._use_one_thread():
            return self._fill_lists(keys, probes, cells)

    def _read_graph(self, index: Any) -> dict[str, np.ndarray]:
        """What is saved of a graph; nothing of an index without one."""
        if not isinstance(self._settings, FaissHnswSettings):
            return {}
        graph, read = index.hnsw, self._faiss.vector_to_array
        return {
            "levels": read(graph.levels),
            "offsets": read(graph.offsets).astype(np.int64),
            "neighbors": read(graph.neighbors),
            "entry": np.array([graph.entry_point], np.int32),
        }

    def _restore_graph(self, arrays: Mapping[str, np.ndarray], keys: np.ndarray) -> KeyBlock:
        index = self._make_empty(keys.shape[1])
        graph, copy = index.hnsw, self._faiss.copy_array_to_vector
        places = self._faiss.vector_to_array(graph.cum_nneighbor_per_level).astype(np.int64)
        _check_graph(arrays, len(keys), places)
        copy(arrays["levels"], graph.levels)
        copy(arrays["offsets"].astype(np.uint64), graph.offsets)
        copy(arrays["neighbors"], graph.neighbors)
        graph.entry_point = int(arrays["entry"][0])
        graph.max_level = int(arrays["levels"].max()) - 1
        keys = self._clip(keys)
        index.train(keys)
        index.storage.add(keys)
        index.ntotal = len(keys)
        return FaissBlock(index, self._faiss, self._settings, dict(arrays))

    def _clip(self, keys: np.ndarray) -> np.ndarray:
        """Keys that their storage can hold."""
        if isinstance(self._settings, (FaissFlatSettings, FaissInt8Settings)):
            return keys
        fits = keys.min() >= -_FP16_MAX and keys.max() <= _FP16_MAX
        return keys if fits else keys.clip(-_FP16_MAX, _FP16_MAX)

    def _make_empty(self, dim: int) -> Any:
        settings, metric = self._settings, self._faiss.METRIC_INNER_PRODUCT
        if not isinstance(settings, FaissHnswSettings):
            return self._faiss.index_factory(dim, _KINDS[type(settings)], metric)
        index = self._faiss.index_factory(dim, f"HNSW{settings.num_links}_SQfp16", metric)
        index.hnsw.efConstruction = settings.ef_construction
        return index

    @contextlib.contextmanager
    def _use_one_thread(self) -> Iterator[None]:
        """Let Faiss work in this thread only: several would link a graph in any order."""
        before = self._faiss.omp_get_max_threads()
        self._faiss.omp_set_num_threads(1)
        try:
            yield
        finally:
            self._faiss.omp_set_num_threads(before)


class FaissBlock(KeyBlock):
    """A Faiss index and how it is searched."""

    def __init__(
        self, index: Any, faiss: Any, settings: SealedSettings, saved: dict[str, np.ndarray]
    ) -> None:
        """Keep them."""
        self._index, self._faiss, self._settings, self._saved = index, faiss, settings, saved

    def search(
        self, queries: np.ndarray, num_candidates: int, wanted: range
    ) -> tuple[np.ndarray, np.ndarray]:
        """As `KeyBlock.search`: what is not wanted is passed over."""
        faiss, index, settings = self._faiss, self._index, self._settings
        options: dict[str, Any] = {}
        if len(wanted) < index.ntotal:
            options["sel"] = faiss.IDSelectorRange(wanted.start, wanted.stop)
        if isinstance(settings, FaissIvfSettings):
            probes = min(settings.num_probes, index.nlist)
            parameters = faiss.SearchParametersIVF(nprobe=probes, **options)
        elif isinstance(settings, FaissHnswSettings):
            # As many of those that are wanted are looked through as in a whole block.
            width = -(-settings.ef_search * index.ntotal // len(wanted))
            width = max(width, num_candidates)
            parameters = faiss.SearchParametersHNSW(efSearch=width, **options)
        else:
            parameters = faiss.SearchParameters(**options)
        scores, found = index.search(queries, num_candidates, params=parameters)
        return found, scores

    def dump(self) -> dict[str, np.ndarray]:
        """As `KeyBlock.dump`."""
        return self._saved


def _check_graph(arrays: Mapping[str, np.ndarray], num_keys: int, places: np.ndarray) -> None:
    """Refuse a graph in which a search could leave the arrays.

    `places[l]` is how many links a key has room for below level l.
    """
    levels, offsets, neighbors, entry = (arrays[name] for name in _GRAPH_ARRAYS)
    _check_array("levels", levels, np.int32, (num_keys,))
    _check_array("offsets", offsets, np.int64, (num_keys + 1,))
    _check_array("neighbors", neighbors, np.int32, (-1,))
    _check_array("entry", entry, np.int32, (1,))
    if levels.min() < 1 or levels.max() >= len(places):
        raise _refuse(f"keys on {levels.min()} to {levels.max()} of {len(places) - 1} levels")
    if offsets[0] != 0 or (np.diff(offsets) != places[levels]).any():
        raise _refuse("links that are not where those of their keys stand")
    if len(neighbors) != offsets[-1] or neighbors.min() < -1 or neighbors.max() >= num_keys:
        raise _refuse(f"links to others than its {num_keys} keys")
    if not 0 <= entry[0] < num_keys or levels[entry[0]] != levels.max():
        raise _refuse(f"an entry {entry[0]} that is not on the highest level")
    owners = np.repeat(np.arange(num_keys), np.diff(offsets))
    level = np.searchsorted(places, np.arange(len(neighbors)) - offsets[owners], "right") - 1
    if ((neighbors >= 0) & (levels[neighbors] <= level)).any():
        raise _refuse("links to keys that are not on their level")


def _check_array(name: str, array: np.ndarray, dtype: type, shape: tuple[int, ...]) -> None:
    """Refuse another dtype or shape; -1 is any length."""
    fits = len(array.shape) == len(shape) and all(
        wanted in (-1, found) for found, wanted in zip(array.shape, shape, strict=True)
    )
    if array.dtype != dtype or not fits:
        raise _refuse(f"{name} {array.shape} {array.dtype}, expected {shape} {np.dtype(dtype)}")


def _refuse(what: str) -> StateError:
    return StateError(f"a saved block has {what}; build the index again from the keys")


def learn_routing(
    centers: np.ndarray, keys: np.ndarray, cells: np.ndarray, queries: np.ndarray
) -> np.ndarray:
    """Vectors whose inner products with a query tell the cells that hold its nearest keys.

    They minimize the cross entropy of softmax(vectors @ query) against the shares of the query's
    32 nearest keys that lie in each cell, starting at the centers. Deterministic.

    Args:
        centers: (L, D) fp32.
        keys: (n, D).
        cells: (n,) int64: the cell of each key.
        queries: (m, D).

    Returns:
        (L, D) fp32.
    """
    # Memories are written to without gradient, or in inference mode.
    with torch.inference_mode(False), torch.enable_grad():
        asked = functional.normalize(torch.from_numpy(queries), dim=-1)
        shares = _count_shares(asked, torch.from_numpy(keys), torch.from_numpy(cells), len(centers))
        vectors = torch.from_numpy(centers)
        scale = _SHARPNESS / vectors.norm(dim=-1).mean().clamp(min=1e-30)
        vectors = (scale * vectors).requires_grad_()
        optimizer = torch.optim.Adam([vectors], lr=_LEARNING_RATE)
        for _ in range(_NUM_STEPS):
            optimizer.zero_grad()
            functional.cross_entropy(asked @ vectors.T, shares).backward()
            optimizer.step()
        return vectors.detach().numpy()


def _count_shares(
    queries: torch.Tensor, keys: torch.Tensor, cells: torch.Tensor, num_cells: int
) -> torch.Tensor:
    """(m, L): the share of each query's nearest keys that lies in each cell."""
    k = min(_NUM_NEIGHBORS, len(keys))
    shares = torch.zeros(len(queries), num_cells)
    step = max(1, _TILE_BYTES // (4 * len(keys)))
    for start in range(0, len(queries), step):
        part = slice(start, start + step)
        nearest = (queries[part] @ keys.T).topk(k, dim=-1).indices
        shares[part].scatter_add_(1, cells[nearest], torch.full(nearest.shape, 1.0 / k))
    return shares
