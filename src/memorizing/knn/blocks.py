"""What another library's index must be able to do to be used by `SealedIndex`.

Shapes: n keys, T queries, c candidates, D head_dim, H heads.
"""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

import numpy as np
from torch import Tensor

from memorizing.errors import IndexUnavailableError, StateError

_MOST_QUERIES = 4096
"""Per head."""


class KeyBlock(ABC):
    """A library's index over the keys of one block and head. It never changes.

    It may be searched by several threads at once.
    """

    @abstractmethod
    def search(
        self, queries: np.ndarray, num_candidates: int, wanted: range
    ) -> tuple[np.ndarray, np.ndarray]:
        """Find keys with large inner products.

        Args:
            queries: (T, D) fp32, contiguous, finite.
            num_candidates: how many are wanted, 1 to the length of `wanted`.
            wanted: the keys that are wanted, by their numbers within the block. Others may be
                among those found; then so many more are.

        Returns:
            Numbers of keys within the block, (T, c) int64, -1 where fewer were found, and their
            approximate scores (T, c) fp32, larger is nearer; c is at least `num_candidates`.
        """

    @abstractmethod
    def dump(self) -> dict[str, np.ndarray]:
        """What `BlockLibrary.restore` needs beside the keys to make it again, by name."""


class BlockLibrary(ABC):
    """Builds blocks, and makes them again from arrays. The same keys give the same block."""

    trains_on_queries: bool = False
    """Whether `build` makes use of queries."""

    @abstractmethod
    def build(self, keys: np.ndarray, queries: np.ndarray | None) -> KeyBlock:
        """Index keys (n, D), fp32, contiguous, finite, n at least 1.

        Several threads may build at once.

        Args:
            keys: not kept by reference.
            queries: (m, D) that were asked before, or None.
        """

    @abstractmethod
    def restore(self, arrays: Mapping[str, np.ndarray], keys: np.ndarray) -> KeyBlock:
        """Make a block again from its keys and what `KeyBlock.dump` gave, which is not trusted.

        Raises:
            StateError: the arrays are none of a block of so many keys.
        """


class QuerySample:
    """Per head, up to 4,096 queries, each seen so far with the same chance (reservoir sampling).

    Vitter 1985, algorithm R. The same seed and the same queries give the same sample.
    """

    def __init__(self) -> None:
        """Start empty."""
        self._kept: np.ndarray | None = None
        self._num_seen = 0
        self._random = np.random.default_rng(0)

    def add(self, queries: Tensor) -> None:
        """Take in queries (B, H, T, D). In place.

        Raises:
            StateError: they have other heads or another length than those before.
        """
        _, num_heads, _, dim = queries.shape
        new = queries.detach().float().cpu().transpose(0, 1).reshape(num_heads, -1, dim).numpy()
        if self._kept is None:
            self._kept = np.empty((num_heads, _MOST_QUERIES, dim), np.float32)
        if self._kept.shape[::2] != new.shape[::2]:
            raise StateError(
                f"queries of {num_heads} heads and length {dim} cannot join those seen before, of "
                f"{self._kept.shape[0]} and {self._kept.shape[2]}; use one index per model layer"
            )
        numbers = self._num_seen + np.arange(new.shape[1])
        places = np.where(numbers < _MOST_QUERIES, numbers, self._random.integers(0, numbers + 1))
        for number, place in enumerate(places):
            if place < _MOST_QUERIES:
                self._kept[:, place] = new[:, number]
        self._num_seen += new.shape[1]

    def get(self, head: int) -> np.ndarray | None:
        """The sample of a head (m, D) fp32, or None while there is none."""
        if self._kept is None or self._num_seen == 0:
            return None
        return self._kept[head, : self._num_seen]


def import_package(name: str, extra: str) -> Any:
    """Import an optional package.

    Raises:
        IndexUnavailableError: it is not installed; the message has the command.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise IndexUnavailableError(
            f"this index needs the package {name}, which cannot be imported ({error}); install it "
            f"with: pip install 'memorizing[{extra}]'"
        ) from error
