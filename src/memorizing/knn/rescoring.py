"""Candidates of other searches, scored again with the stored keys.

Shapes: H heads, T queries, C candidates, D head_dim, k neighbors.
"""

from __future__ import annotations

import torch
from torch import Tensor

from memorizing.knn.index import StoredKeys

_TILE_BYTES = 32 * 2**20
"""Keys in fp32 of the candidates that are scored together."""


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
