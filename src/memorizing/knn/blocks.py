"""What another library's index must be able to do to be used by `SealedIndex`.

Shapes: n keys, T queries, c candidates, D head_dim.
"""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

import numpy as np

from memorizing.errors import IndexUnavailableError


class KeyBlock(ABC):
    """A library's index over the keys of one block and head. It never changes.

    It may be searched by several threads at once.
    """

    @abstractmethod
    def search(self, queries: np.ndarray, num_candidates: int) -> tuple[np.ndarray, np.ndarray]:
        """Find keys with large inner products.

        Args:
            queries: (T, D) fp32, contiguous, finite.
            num_candidates: how many are wanted, 1 to n.

        Returns:
            Numbers of keys within the block, (T, c) int64, -1 where fewer were found, and their
            approximate scores (T, c) fp32, larger is nearer; c is `num_candidates`.
        """

    @abstractmethod
    def dump(self) -> dict[str, bytes]:
        """The contents of the files from which `BlockLibrary.restore` makes it again, by name."""


class BlockLibrary(ABC):
    """Builds blocks, and makes them again from files."""

    is_saved: bool
    """Whether blocks are worth a file; otherwise they are built again from the keys."""
    trains_on_queries: bool = False
    """Whether `build` makes use of queries."""

    @abstractmethod
    def build(self, keys: np.ndarray, queries: np.ndarray | None) -> KeyBlock:
        """Index keys (n, D), fp32, contiguous, finite, n at least 1.

        Args:
            keys: not kept by reference.
            queries: (m, D) that were asked before, or None.
        """

    @abstractmethod
    def restore(self, files: Mapping[str, bytes], num_keys: int, dim: int) -> KeyBlock:
        """Make a block again from what `KeyBlock.dump` gave.

        Raises:
            StateError: the files hold another number of keys, or keys of another length.
        """


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
