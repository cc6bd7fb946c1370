"""The plain search: a matrix product and the top k in two stages, in operations any device has.

The oracle of the faster search on CPUs (`packed.py`), and what runs on other devices.

The scores of a query are split into `num_buckets` strided buckets: element j of bucket b stands at
j * num_buckets + b, so that the maxima of all buckets are vertical SIMD operations over contiguous
memory. The k buckets with the largest maxima are kept and the top k is taken among their members.
This is exact: a bucket that holds one of the true top k has a maximum at least as large, and fewer
than k buckets can exceed it.

Shapes: H heads, T queries, N slots, D head_dim.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from memorizing.devices import send

_TILE_BYTES = 16 * 2**20
"""Scores of one tile of queries: small enough to stay in a shared cache between the product and
the selection."""

_ACCELERATOR_TILE_BYTES = 2**30
"""On an accelerator, where every tile costs a dozen launches and bandwidth is plenty."""


def search_plainly(
    queries: Tensor, keys: Tensor, k: int, newest: int, num_hidden: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Scores and slots, each (H, T, k), of queries (H, T, D) among keys (H, N, D); k <= N.

    Scores are products in fp32, or fp64 of fp64 keys.
    Equal scores of fp32 keys are ordered newest first: `newest` is the slot written last.
    `num_hidden` (T,) counts the newest entries that a query must not see.
    """
    heads, num_queries, _ = queries.shape
    dtype = torch.promote_types(keys.dtype, torch.float32)
    scores = keys.new_empty(heads, num_queries, k, dtype=dtype)
    slots = torch.empty_like(scores, dtype=torch.int64)
    query_bytes = keys.shape[1] * dtype.itemsize
    for part, span in iterate_tiles(heads, num_queries, query_bytes, keys.device):
        scores[part, span], slots[part, span] = _search_tile(
            queries[part, span],
            keys[part],
            k,
            newest,
            None if num_hidden is None else num_hidden[span],
        )
    return scores, slots


def iterate_tiles(
    num_heads: int, num_queries: int, query_bytes: int, device: torch.device
) -> Iterator[tuple[slice, slice]]:
    """Split heads x queries into tiles whose scores, `query_bytes` for each, fit a tile."""
    tile_bytes = _TILE_BYTES if device.type == "cpu" else _ACCELERATOR_TILE_BYTES
    num_together = max(1, tile_bytes // query_bytes)
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
    size = keys.shape[1]
    bucket_len = _choose_bucket_len(size, k)
    num_buckets = -(-size // bucket_len)
    dtype = torch.promote_types(keys.dtype, torch.float32)
    scores = score_tile(queries, keys, num_buckets * bucket_len, newest, num_hidden, dtype)
    if keys.dtype != torch.float32:
        return _select_two_stage(scores, k, bucket_len, num_buckets)
    if keys.device.type == "cpu":  # the oracle: simple
        return sort_newest_first(scores[..., :size], k, newest)
    return _select_newest_first(scores, size, k, newest)


def score_tile(
    queries: Tensor,
    keys: Tensor,
    width: int,
    newest: int,
    num_hidden: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """Scores (H, T, width) in `dtype` of queries and keys; -inf beyond the N keys and where hidden.

    Sums are in fp32 at least.
    """
    size = keys.shape[1]
    if keys.device.type == "cpu":
        scores = queries.new_empty(*queries.shape[:2], width, dtype=dtype)
        scores[..., size:] = -math.inf
        for asked, lines, out in zip(queries.to(dtype), keys, scores, strict=True):
            torch.mm(asked, lines.to(dtype).T, out=out[:, :size])
    else:
        options: dict[str, Any] = {}
        if keys.device.type == "cuda" and dtype != keys.dtype:
            options["out_dtype"] = dtype
        else:
            queries, keys = queries.to(dtype), keys.to(dtype)
        scores = torch.bmm(queries, keys.transpose(1, 2), **options)
        scores = functional.pad(scores, (0, width - size), value=-math.inf)
    if num_hidden is not None:
        _hide_newest(scores, size, newest, num_hidden)
    return scores


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


def sort_newest_first(scores: Tensor, k: int, newest: int) -> tuple[Tensor, Tensor]:
    """Top k of scores (..., N), equal ones newest first: a stable sort in the order of age."""
    size = scores.shape[-1]
    by_age = (newest - torch.arange(size, device=scores.device)) % size
    best, chosen = scores[..., by_age].sort(dim=-1, descending=True, stable=True)
    return best[..., :k], by_age[chosen[..., :k]]


def _select_newest_first(scores: Tensor, size: int, k: int, newest: int) -> tuple[Tensor, Tensor]:
    """As `sort_newest_first` of the first `size` scores, which are sorted only where the k-th ties.

    `scores` has the width of whole buckets, -inf beyond `size`.
    """
    bucket_len = _choose_bucket_len(size, k)
    num_left = min(k + 1, size)  # one more shows whether an equal one was left out
    best, slots = _select_two_stage(scores, num_left, bucket_len, scores.shape[-1] // bucket_len)
    is_tied = (best[..., k - 1] == best[..., -1]) & (best[..., -1] > -math.inf) & (num_left > k)
    by_age = ((newest - slots[..., :k]) % size).argsort(dim=-1)
    best, slots = best[..., :k].gather(-1, by_age), slots[..., :k].gather(-1, by_age)
    best, order = best.sort(dim=-1, descending=True, stable=True)
    slots = slots.gather(-1, order)
    head, query = is_tied.nonzero(as_tuple=True)
    if len(head):
        best[head, query], slots[head, query] = sort_newest_first(
            scores[head, query, :size], k, newest
        )
    return best, slots


def _hide_newest(scores: Tensor, size: int, newest: int, num_hidden: Tensor) -> None:
    """Set the scores of the newest `num_hidden[t]` entries to -inf for query t, in place."""
    most = min(int(num_hidden.max()), size)
    if most == 0:
        return
    ages = torch.arange(most, device=scores.device)
    slots = (newest - ages) % size
    hide = ages < send(num_hidden, scores.device).unsqueeze(-1)
    scores[..., slots] = scores[..., slots].masked_fill(hide, -math.inf)
