"""Exact search: every key is scored; and candidates of other searches, scored again in fp32.

Shapes: B rows, H heads, T queries, N slots, D head_dim, C candidates, k neighbors.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from memorizing.knn.index import KeysOnlyIndex, Neighbors, StoredKeys, search_rows
from memorizing.knn.packed import can_pack, search_packed
from memorizing.knn.plain import search_plainly

_TILE_BYTES = 32 * 2**20
"""Keys in fp32 of the candidates that are scored together."""


def search_exact(
    queries: Tensor,
    keys: Tensor,
    sizes: Sequence[int],
    num_neighbors: int,
    *,
    newest_slots: Sequence[int] | None = None,
    num_hidden: Tensor | None = None,
    key_rows: Sequence[int | None] | None = None,
) -> Neighbors:
    """Find the entries with the largest inner products, per row and head (paper, section 3.1).

    Entries are chosen by products, in fp32, of the stored keys and of queries rounded to the dtype
    of the keys. With fp32 keys, equal scores are ordered newest first; where entries tie with the
    k-th, that takes a full sort. With bf16 or fp16 keys it is left open which of those that equal
    the k-th are returned.

    Args:
        queries: (B, H, T, D). No gradient flows through the search.
        keys: (B, H, N, D). In row b, slots 0 to sizes[b] - 1 hold entries.
        sizes: entries per row of `keys`, 0 to N.
        num_neighbors: k.
        newest_slots: per row the slot written last (the ring continues backwards from there); by
            default the entries were written in the order of their slots.
        num_hidden: (B, T) int: how many of the newest entries each query must not see; by default
            none.
        key_rows: per row of queries, the row of `keys` that it searches, or None for a row that
            finds nothing; by default its own.

    Returns:
        Neighbors, best first.
    """
    stored = StoredKeys(keys, tuple(sizes))
    newest = [size - 1 for size in sizes] if newest_slots is None else newest_slots

    def search(
        queries: Tensor, stored: StoredKeys, row: int, k: int, hidden: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        return search_heads(queries, stored.keys[row, :, : sizes[row]], k, newest[row], hidden)

    return search_rows(search, queries, stored, num_neighbors, num_hidden, key_rows)


def search_heads(
    queries: Tensor, keys: Tensor, k: int, newest: int, num_hidden: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Scores and slots (H, T, k) of queries (H, T, D) among keys (H, N, D), exactly; k <= N."""
    search = search_packed if can_pack(k, keys) else search_plainly
    return search(queries, keys, k, newest, num_hidden)


class ExactIndex(KeysOnlyIndex):
    """Exact search over the stored keys themselves."""

    def _search_row(
        self, queries: Tensor, stored: StoredKeys, row: int, k: int, num_hidden: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        keys = stored.keys[row, :, : stored.sizes[row]]
        return search_heads(queries, keys, k, stored.newest_slots[row], num_hidden)


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
