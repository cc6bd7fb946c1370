"""Exact search: a matrix product, then the top k in two stages.

The scores of a query are split into `num_buckets` strided buckets: element j of bucket b stands at
j * num_buckets + b, so that the maxima of all buckets are vertical SIMD operations over contiguous
memory. The k buckets with the largest maxima are kept and the top k is taken among their members.
This is exact: a bucket that holds one of the true top k has a maximum at least as large, and fewer
than k buckets can exceed it.

Shapes: B rows, H heads, T queries, N slots, D head_dim.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from memorizing.index_settings import ExactSettings
from memorizing.knn.index import KeyIndex, StoredKeys
from memorizing.knn.neighbors import Neighbors

_TILE_BYTES = 16 * 2**20
"""Scores of one tile of queries: small enough to stay in a shared cache between the product and
the selection."""


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
    are ordered newest first; that takes a full sort, far slower in a large memory. With bf16 or
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
    num_rows, num_heads, num_queries, _ = queries.shape
    shape = (num_rows, num_heads, num_queries, num_neighbors)
    slots = torch.zeros(shape, dtype=torch.int64, device=keys.device)
    scores = torch.full(shape, -math.inf, dtype=keys.dtype, device=keys.device)
    queries = queries.detach().to(keys.dtype)
    with torch.no_grad():
        for row in range(num_rows):
            source = row if key_rows is None else key_rows[row]
            size = 0 if source is None else sizes[source]
            if source is None or size == 0 or num_queries == 0:
                continue
            newest = size - 1 if newest_slots is None else newest_slots[source]
            hidden = None if num_hidden is None else num_hidden[row]
            k = min(num_neighbors, size)
            for heads, part in _iterate_tiles(num_heads, num_queries, size, keys.dtype.itemsize):
                found = _search_tile(
                    queries[row, heads, part],
                    keys[source, heads, :size],
                    k,
                    newest,
                    None if hidden is None else hidden[part],
                )
                scores[row, heads, part, :k], slots[row, heads, part, :k] = found
    valid = scores > -math.inf
    return Neighbors(slots.masked_fill_(~valid, 0), scores, valid)


def _iterate_tiles(
    num_heads: int, num_queries: int, size: int, item_bytes: int
) -> Iterator[tuple[slice, slice]]:
    """Split heads x queries into tiles whose scores fit `_TILE_BYTES`."""
    row_bytes = size * item_bytes
    num_together = max(1, _TILE_BYTES // row_bytes)
    if num_together >= num_queries:
        step = num_together // num_queries
        for head in range(0, num_heads, step):
            yield slice(head, head + step), slice(None)
    else:
        for head in range(num_heads):
            for start in range(0, num_queries, num_together):
                yield slice(head, head + 1), slice(start, start + num_together)


def _search_tile(
    queries: Tensor, keys: Tensor, k: int, newest: int, num_hidden: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Scores and slots, each (H, T, k), of queries (H, T, D) among keys (H, N, D)."""
    num_heads, num_queries, _ = queries.shape
    size = keys.shape[1]
    bucket_len = _choose_bucket_len(size, k)
    num_buckets = -(-size // bucket_len)
    width = num_buckets * bucket_len
    scores = queries.new_empty(num_heads, num_queries, width)
    if width > size:
        scores[..., size:] = -math.inf
        for head in range(num_heads):
            torch.mm(queries[head], keys[head].T, out=scores[head, :, :size])
    else:
        torch.bmm(queries, keys.transpose(1, 2), out=scores)
    if num_hidden is not None:
        _hide_newest(scores, size, newest, num_hidden)
    if keys.dtype == torch.float32:
        return _select_newest_first(scores[..., :size], k, newest)
    return _select_two_stage(scores, k, bucket_len, num_buckets)


def _choose_bucket_len(size: int, k: int) -> int:
    """About sqrt(N / k): as many buckets to look through as members of the k that are kept."""
    if size <= 4 * k:
        return 1
    return 2 ** max(0, round(math.log2(math.sqrt(size / k))))


def _select_two_stage(
    scores: Tensor, k: int, bucket_len: int, num_buckets: int
) -> tuple[Tensor, Tensor]:
    if bucket_len == 1:
        best, slots = scores.topk(k, dim=-1)
        return best, slots
    heads, queries, _ = scores.shape
    maxima = scores.view(heads, queries, bucket_len, num_buckets).amax(2)
    buckets = maxima.topk(k, dim=-1, sorted=False).indices
    offsets = torch.arange(bucket_len, device=scores.device) * num_buckets
    members = (buckets.unsqueeze(-1) + offsets).flatten(-2)
    best, chosen = scores.gather(-1, members).topk(k, dim=-1)
    return best, members.gather(-1, chosen)


def _select_newest_first(scores: Tensor, k: int, newest: int) -> tuple[Tensor, Tensor]:
    """Top k, equal scores newest first: a stable sort of the entries in the order of age."""
    size = scores.shape[-1]
    by_age = (newest - torch.arange(size, device=scores.device)) % size
    best, chosen = scores[..., by_age].sort(dim=-1, descending=True, stable=True)
    return best[..., :k], by_age[chosen[..., :k]]


def _hide_newest(scores: Tensor, size: int, newest: int, num_hidden: Tensor) -> None:
    """Set the scores of the newest `num_hidden[t]` entries to -inf for query t, in place."""
    most = min(int(num_hidden.max()), size)
    if most == 0:
        return
    ages = torch.arange(most, device=scores.device)
    slots = (newest - ages) % size
    hide = ages < num_hidden.to(scores.device).unsqueeze(-1)
    scores[..., slots] = scores[..., slots].masked_fill(hide, -math.inf)


class ExactIndex(KeyIndex):
    """Exact search over the stored keys themselves."""

    def __init__(self, settings: ExactSettings) -> None:
        """Keep the settings."""
        super().__init__(settings)

    def search(
        self,
        queries: Tensor,
        stored: StoredKeys,
        num_neighbors: int,
        *,
        num_hidden: Tensor | None = None,
        key_rows: Sequence[int | None] | None = None,
    ) -> Neighbors:
        """As `KeyIndex.search`."""
        return search_exact(
            queries,
            stored.keys,
            stored.sizes,
            num_neighbors,
            newest_slots=stored.newest_slots,
            num_hidden=num_hidden,
            key_rows=key_rows,
        )

    def append(self, stored: StoredKeys) -> None:
        """Nothing: the keys are all it needs."""

    def reset(self, rows: Sequence[int]) -> None:
        """Nothing."""

    def seal(self, stored: StoredKeys) -> None:
        """Nothing."""

    def save(self, folder: Path) -> None:
        """Nothing."""

    def load(self, folder: Path, stored: StoredKeys) -> None:
        """Nothing."""
