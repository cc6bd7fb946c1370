"""A bounded random sample of the queries seen so far."""

from __future__ import annotations

import numpy as np
from torch import Tensor

from memorizing.errors import StateError

_MOST_QUERIES = 4096
"""Per head."""


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
