"""An index that searches for given queries in the place of those it is asked."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from memorizing.benchmark.delegating_index import DelegatingIndex
from memorizing.knn import KeyIndex, Neighbors, StoredKeys


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

    def search(
        self,
        queries: Tensor,
        stored: StoredKeys,
        num_neighbors: int,
        *,
        num_hidden: Tensor | None = None,
        key_rows: Sequence[int | None] | None = None,
    ) -> Neighbors:
        """As `KeyIndex.search`, for the next recorded query; `queries` are (1, H, 1, D)."""
        place = self.num_replayed % self.queries.shape[1]
        replayed = self.queries[:, place : place + 1].unsqueeze(0)
        assert queries.shape == replayed.shape, (queries.shape, replayed.shape)
        self.num_replayed += 1
        return self.index.search(
            replayed, stored, num_neighbors, num_hidden=num_hidden, key_rows=key_rows
        )
