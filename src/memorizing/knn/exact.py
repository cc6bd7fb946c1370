"""Exact search: every key is scored.

Shapes: B rows, H heads, T queries, N slots, D head_dim.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from memorizing.index_settings import ExactSettings
from memorizing.knn.index import StoredKeys
from memorizing.knn.neighbors import Neighbors
from memorizing.knn.packed import can_pack, search_packed
from memorizing.knn.plain import search_plainly
from memorizing.knn.rescoring import merge_candidates
from memorizing.knn.rows import KeysOnlyIndex, search_rows


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

    Scores are products in the dtype of `keys`, accumulated in fp32. With fp32 keys, equal scores
    are ordered newest first; where entries tie with the k-th, that takes a full sort. With bf16 or
    fp16 keys many scores are equal after rounding; which of those that equal the k-th are returned
    is then left open, so that every returned score is at least the k-th true score less one
    rounding.

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
    """Exact search over the stored keys themselves.

    Scores have the rounding of the stored dtype, and so has the choice of the k-th. With `rescore`,
    every entry whose rounded score is not below the rounded k-th is a candidate, scored again in
    fp32; the choice is then exact. Where many keys are equal, all of them are candidates.
    """

    def __init__(self, settings: ExactSettings) -> None:
        """Keep the settings."""
        super().__init__(settings)
        self.rescore = settings.rescore

    def _search_row(
        self, queries: Tensor, stored: StoredKeys, row: int, k: int, num_hidden: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        if self.rescore and stored.keys.dtype != torch.float32:
            return _search_rescored(queries, stored, row, k, num_hidden)
        keys = stored.keys[row, :, : stored.sizes[row]]
        return search_heads(queries, keys, k, stored.newest_slots[row], num_hidden)


def _search_rescored(
    queries: Tensor, stored: StoredKeys, row: int, k: int, hidden: Tensor | None
) -> tuple[Tensor, Tensor]:
    size = stored.sizes[row]
    keys, newest = stored.keys[row, :, :size], stored.newest_slots[row]
    num_candidates = k
    while True:
        num_candidates = min(2 * num_candidates, size)
        scores, slots = search_heads(queries, keys, num_candidates, newest, hidden)
        # Rounding keeps the order, so none of the true top k is below the k-th after rounding.
        last = scores[..., -1]
        # Where the last is -inf, everything that the query sees is a candidate.
        if num_candidates == size or bool(((last < scores[..., k - 1]) | last.isneginf()).all()):
            break
    candidates = slots.masked_fill(scores == -math.inf, -1)
    best, exact_scores = merge_candidates(queries, stored, row, candidates, k)
    return exact_scores.to(keys.dtype), best
