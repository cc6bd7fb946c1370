"""What every index over the keys of a memory can do; and exact search, which scores every key.

Shapes: B rows, H heads, T queries, N slots, D head_dim, C candidates, k neighbors.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from memorizing.errors import NonFiniteQueryError
from memorizing.index_settings import IndexSettings
from memorizing.knn.packed import can_pack, search_packed
from memorizing.knn.plain import search_plainly

_TILE_BYTES = 32 * 2**20
"""Keys in fp32 of the candidates that are scored together."""


@dataclass(frozen=True)
class Neighbors:
    """The nearest entries of every query. B rows, H heads, T queries, k neighbors, best first.

    Where a memory holds fewer than k entries, `valid` is False, the score -inf and the slot 0.
    """

    slots: Tensor
    """(B, H, T, k) int64: where the entries are stored."""
    scores: Tensor
    """(B, H, T, k): inner products of queries and stored keys, rounded to the dtype of the keys;
    larger is nearer."""
    valid: Tensor
    """(B, H, T, k) bool."""


@dataclass(frozen=True)
class StoredKeys:
    """The keys of one memory as they are now: a ring of slots per row, by reference.

    Entry e of a row, counted from the start of its document, lies in slot e % N of every head; the
    entries from `num_appended - size` on are there, older ones are overwritten.
    """

    keys: Tensor
    """(B, H, N, D), contiguous."""
    num_appended: tuple[int, ...]
    """Per row, entries appended since it was reset."""

    @property
    def capacity(self) -> int:
        """N: slots of a row."""
        return self.keys.shape[2]

    @property
    def sizes(self) -> list[int]:
        """Per row, entries that are there now, 0 to N."""
        return [min(count, self.capacity) for count in self.num_appended]

    @property
    def living(self) -> list[range]:
        """Per row, the entries that are there now."""
        return [range(max(0, count - self.capacity), count) for count in self.num_appended]

    @property
    def newest_slots(self) -> list[int]:
        """Per row, the slot written last; the ring continues backwards from there."""
        return [(count - 1) % self.capacity for count in self.num_appended]


def check_queries(queries: Tensor) -> None:
    """Refuse queries (B, H, T, D) that are NaN or infinite: no key is nearest to them.

    Raises:
        NonFiniteQueryError: with the row and head of the first of them.
    """
    if queries.numel() == 0:
        return
    # One pass without a temporary, one wait for a GPU; a NaN makes both of them NaN.
    if bool(torch.stack(queries.detach().aminmax()).isfinite().all()):
        return
    row, head, query, _ = (~queries.detach().isfinite()).nonzero()[0].tolist()
    raise NonFiniteQueryError(
        f"query {query} of row {row}, head {head} is NaN or infinite in {queries.dtype}; only "
        "finite queries have nearest keys: look for NaN in the weights or the input, or use a "
        "dtype of wider range"
    )


class KeyIndex:
    """Finds the stored keys with the largest inner products with a query.

    The memory owns keys and slots; an index keeps at most what makes its search faster (a graph,
    codes) and is told of every change: `append` after entries were written, `reset` when rows were
    emptied. One that needs nothing but the keys ignores all that. Every score it returns is the
    true inner product of the query and the stored key.
    """

    def __init__(self, settings: IndexSettings) -> None:
        """Keep the settings."""
        self.settings = settings

    def search(
        self,
        queries: Tensor,
        stored: StoredKeys,
        num_neighbors: int,
        *,
        num_hidden: Tensor | None = None,
        key_rows: Sequence[int | None] | None = None,
    ) -> Neighbors:
        """Find the nearest entries, per row and head (paper, section 3.1). Changes nothing.

        Args:
            queries: (B, H, T, D), finite. No gradient flows through the search.
            stored: the keys, of which this index was told everything.
            num_neighbors: k.
            num_hidden: (B, T) int: how many of the newest entries each query must not see; by
                default none.
            key_rows: per row of queries, the row of keys that it searches, or None for a row that
                is not searched and finds nothing; by default its own.

        Returns:
            Neighbors, best first, scores in the dtype of the keys.

        Raises:
            NonFiniteQueryError: a query is NaN or infinite.
        """
        num_rows, num_heads, num_queries, _ = queries.shape
        shape = (num_rows, num_heads, num_queries, num_neighbors)
        keys = stored.keys
        slots = torch.zeros(shape, dtype=torch.int64, device=keys.device)
        scores = torch.full(shape, -math.inf, dtype=keys.dtype, device=keys.device)
        queries = queries.detach().to(keys.dtype)
        check_queries(queries)
        # A search asks for the largest of them, which would be a wait for a GPU in every row.
        num_hidden = None if num_hidden is None else num_hidden.cpu()
        with torch.no_grad():
            for row in range(num_rows):
                source = row if key_rows is None else key_rows[row]
                k = 0 if source is None else min(num_neighbors, stored.sizes[source])
                if source is None or k == 0 or num_queries == 0:
                    continue
                hidden = None if num_hidden is None else num_hidden[row]
                found = self._search_row(queries[row], stored, source, k, hidden)
                scores[row, ..., :k], slots[row, ..., :k] = found
        valid = scores > -math.inf
        # A key that is NaN may take the place of a neighbor; it is not returned.
        slots, scores = slots.masked_fill_(~valid, 0), scores.masked_fill_(~valid, -math.inf)
        return Neighbors(slots, scores, valid)

    def _search_row(
        self, queries: Tensor, stored: StoredKeys, row: int, k: int, num_hidden: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Scores and slots (H, T, k) of queries (H, T, D) among the keys of a row, best first.

        Every index has this, or replaces `search`. `num_hidden` is (T,) on the CPU; k is 1 to the
        size of the row.
        """
        raise NotImplementedError

    def propose(
        self, queries: Tensor, stored: StoredKeys, num_neighbors: int
    ) -> tuple[Tensor, Tensor] | None:
        """What a search of row 0 would score exactly: of several memories only the best need be.

        Args:
            queries: (H, T, D) in the dtype of the keys, finite.
            stored: the keys, of which this index was told everything.
            num_neighbors: k.

        Returns:
            Entries, -1 for none, and their scores as far as the index knows them, -inf there; both
            (H, T, C) on the CPU, in any order. None where a search scores other entries as well.
        """
        return None

    def append(self, stored: StoredKeys) -> None:
        """Take in what was written since the last call, in any row. Changes the index in place."""

    def reset(self, rows: Sequence[int]) -> None:
        """Forget what these rows held. Changes the index in place."""

    def seal(self, stored: StoredKeys) -> None:
        """Prepare for a memory that is only read from now on: leave nothing to search slowly.

        May take minutes; appending afterwards is allowed. Changes the index in place.
        """

    def save(self, folder: Path, stored: StoredKeys) -> None:
        """Write what cannot be made again quickly from the keys into a folder, which may be new."""

    def load(self, folder: Path, stored: StoredKeys) -> None:
        """Take over what `save` wrote for the same keys. Changes the index in place.

        Raises:
            StateError: the folder holds no index, or one of other settings or keys; nothing is
                changed then.
        """


class ExactIndex(KeyIndex):
    """Exact search: every key is scored.

    Entries are chosen by products, in fp32, of the stored keys and of queries rounded to the dtype
    of the keys. With fp32 keys, equal scores are ordered newest first; where entries tie with the
    k-th, that takes a full sort. With bf16 or fp16 keys it is left open which of those that equal
    the k-th are returned.
    """

    def _search_row(
        self, queries: Tensor, stored: StoredKeys, row: int, k: int, num_hidden: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        keys = stored.keys[row, :, : stored.sizes[row]]
        return search_heads(queries, keys, k, stored.newest_slots[row], num_hidden)


def search_heads(
    queries: Tensor, keys: Tensor, k: int, newest: int, num_hidden: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Scores and slots (H, T, k) of queries (H, T, D) among keys (H, N, D), exactly; k <= N."""
    search = search_packed if can_pack(k, keys) else search_plainly
    return search(queries, keys, k, newest, num_hidden)


def merge_candidates(
    queries: Tensor, stored: StoredKeys, row: int, entries: Tensor, k: int
) -> tuple[Tensor, Tensor]:
    """The k candidates with the largest inner products in fp32, best first.

    Args:
        queries: (H, T, D).
        stored: the keys.
        row: of the keys.
        entries: (H, T, C) int64, each at most once for a query, -1 where there is none.
        k: how many.

    Returns:
        Entries, -1 where there are fewer than k, and their scores in fp32, -inf there; (H, T, k).
    """
    num_heads, num_queries, num_candidates = entries.shape
    best = entries.new_full((num_heads * num_queries, k), -1)
    scores = torch.full(best.shape, -torch.inf, device=entries.device)
    kept = min(k, num_candidates)
    keys = stored.keys[row]
    heads = torch.arange(num_heads, device=entries.device).view(-1, 1, 1)
    places = (heads * stored.capacity + entries.clamp(min=0) % stored.capacity).flatten(0, 1)
    asked, wanted = queries.flatten(0, 1), entries.flatten(0, 1)
    step = max(1, _TILE_BYTES // (4 * max(1, num_candidates) * queries.shape[2]))
    for start in range(0, len(wanted) if kept else 0, step):
        part = slice(start, start + step)
        picked = keys.flatten(0, 1).index_select(0, places[part].flatten()).float()
        picked = picked.view(-1, num_candidates, keys.shape[-1])
        found = torch.bmm(picked, asked[part].float().unsqueeze(-1)).squeeze(-1)
        found = found.masked_fill(wanted[part] < 0, -torch.inf)
        scores[part, :kept], order = found.topk(kept, dim=-1)
        best[part, :kept] = wanted[part].gather(-1, order)
    shape = (num_heads, num_queries, k)
    return best.view(shape), scores.view(shape)
