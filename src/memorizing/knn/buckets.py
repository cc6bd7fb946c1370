"""Approximate top k as on TPUs: the best few scores of every bucket are the candidates.

Chern et al., "TPU-KNN: K Nearest Neighbor Search at Peak FLOP/s" (2022), for one survivor a bucket;
Samaga et al., "A Faster Generalized Two-Stage Approximate Top-K" (2025), for K'. What is saved is
the second look into the buckets, which accelerators find slow; on a CPU exact search is faster.

Shapes: H heads, T queries, N slots, D head_dim, k neighbors.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from memorizing.index_settings import BucketSettings
from memorizing.knn.index import KeyIndex, StoredKeys, search_heads
from memorizing.knn.packed import is_emulated
from memorizing.knn.plain import iterate_tiles, score_tile


def expect_recall(size: int, k: int, num_buckets: int, per_bucket: int) -> float:
    """Expected share of the true top k that survive, if they lie in random buckets.

    X of the top k fall into a bucket of n slots, hypergeometrically; a bucket keeps K' of them:
    1 - (1 / k) * sum over buckets, and over r > K', of (r - K') P(X = r).
    """
    k = min(k, size)
    num_buckets = _count_buckets(k, num_buckets, per_bucket)
    short_len, num_long = divmod(size, num_buckets)
    lost = 0.0
    for length, count in ((short_len, num_buckets - num_long), (short_len + 1, num_long)):
        ways = sum(
            (r - per_bucket) * math.comb(k, r) * math.comb(size - k, length - r)
            for r in range(per_bucket + 1, min(k, length) + 1)
        )
        if count:
            lost += count * (ways / math.comb(size, length))
    return 1 - lost / k


def _count_buckets(k: int, num_buckets: int, per_bucket: int) -> int:
    """As many as asked for, but enough for k survivors."""
    return max(num_buckets, -(-k // per_bucket))


class BucketIndex(KeyIndex):
    """Scores every key, and keeps the best `per_bucket` of each of `num_buckets` buckets.

    Slot s is in bucket s mod L. There are more buckets than asked for where they could not yield k
    candidates, and a memory of no more slots than candidates is searched exactly.
    """

    def __init__(self, settings: BucketSettings) -> None:
        """Keep the settings."""
        super().__init__(settings)
        self.num_buckets, self.per_bucket = settings.num_buckets, settings.per_bucket

    def _search_row(
        self,
        queries: Tensor,
        stored: StoredKeys,
        row: int,
        k: int,
        num_hidden: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        size, newest = stored.sizes[row], stored.newest_slots[row]
        keys = stored.keys[row, :, :size]
        num_heads, num_queries, _ = queries.shape
        is_wide = keys.device.type == "cpu" and is_emulated(keys.dtype)
        scores = keys.new_empty(
            num_heads, num_queries, k, dtype=torch.float32 if is_wide else keys.dtype
        )
        slots = torch.empty_like(scores, dtype=torch.int64)
        for part, span in iterate_tiles(
            num_heads, num_queries, size * scores.dtype.itemsize, keys.device
        ):
            hidden = None if num_hidden is None else num_hidden[span]
            scores[part, span], slots[part, span] = self._search_tile(
                queries[part, span], keys[part], k, newest, hidden, scores.dtype
            )
        if num_hidden is not None:
            # Where the visible ones share too few buckets, they are searched exactly.
            wanted = (size - num_hidden).clamp(0, k)
            (lacking,) = ((scores > -math.inf).sum(-1).cpu() < wanted).any(0).nonzero(as_tuple=True)
            if len(lacking):
                places = lacking.to(keys.device)
                few = search_heads(queries[:, places], keys, k, newest, num_hidden[lacking])
                scores[:, places], slots[:, places] = few[0].to(scores.dtype), few[1]
        return scores, slots

    def _search_tile(
        self,
        queries: Tensor,
        keys: Tensor,
        k: int,
        newest: int,
        num_hidden: Tensor | None,
        dtype: torch.dtype,
    ) -> tuple[Tensor, Tensor]:
        num_buckets = _count_buckets(k, self.num_buckets, self.per_bucket)
        bucket_len = -(-keys.shape[1] // num_buckets)
        scores = score_tile(queries, keys, bucket_len * num_buckets, newest, num_hidden, dtype)
        buckets = scores.view(*queries.shape[:2], bucket_len, num_buckets)
        base = torch.arange(num_buckets, device=keys.device)
        values, members = [], []
        for survivor in range(min(self.per_bucket, bucket_len)):
            if survivor:
                buckets.scatter_(2, members[-1].unsqueeze(2), -math.inf)
            best, member = buckets.max(2)
            values.append(best)
            members.append(member)
        candidates = torch.cat([member * num_buckets + base for member in members], -1)
        best, chosen = torch.cat(values, -1).topk(k, dim=-1)
        return best, candidates.gather(-1, chosen)
