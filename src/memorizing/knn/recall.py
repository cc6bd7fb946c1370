"""How many of the nearest entries a search found, counted by score.

Shapes: B rows, H heads, T queries, N slots, D head_dim, k neighbors.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from memorizing.knn.index import Neighbors, StoredKeys

_TILE_BYTES = 64 * 2**20
"""True scores of the queries that are compared together."""

_FP32_SLACK = 1e-5


def recall_at_k(
    found: Neighbors,
    queries: Tensor,
    stored: StoredKeys,
    *,
    num_hidden: Tensor | None = None,
    key_rows: Sequence[int | None] | None = None,
) -> float:
    """The share of the k nearest entries that a search found, over all queries, heads and rows.

    An entry counts when its true score (fp32 inner product of the stored key and the query rounded
    to the dtype of the keys) is at least the true k-th score: exact search,
    which selects by such products, has a recall of 1. An entry that is returned twice counts once;
    one that is hidden, overwritten or not valid does not. Where fewer than k entries can be
    seen, that many are the nearest.

    Args:
        found: what the search returned.
        queries: (B, H, T, D), what it was asked.
        stored: the keys it searched.
        num_hidden: (B, T), as in `KeyIndex.search`.
        key_rows: as in `KeyIndex.search`; rows that search nothing are left out.

    Returns:
        0 to 1; 1 where there is nothing to find.
    """
    num_found = num_true = 0
    keys = stored.keys
    for row in range(queries.shape[0]):
        source = row if key_rows is None else key_rows[row]
        if source is None or stored.sizes[source] == 0:
            continue
        size, newest = stored.sizes[source], stored.newest_slots[source]
        ages = (newest - torch.arange(size, device=keys.device)) % stored.capacity
        step = max(1, _TILE_BYTES // (4 * size))
        for head in range(queries.shape[1]):
            slots_of_head = keys[source, head, :size].float()
            for start in range(0, queries.shape[2], step):
                part = slice(start, start + step)
                asked = queries[row, head, part].detach().to(keys.device, keys.dtype).float()
                true = asked @ slots_of_head.T
                if num_hidden is not None:
                    hidden = num_hidden[row, part].to(keys.device).unsqueeze(-1)
                    true = true.masked_fill(ages < hidden, -torch.inf)
                counts = _count_found(
                    true,
                    found.slots[row, head, part],
                    found.valid[row, head, part],
                )
                num_found, num_true = num_found + counts[0], num_true + counts[1]
    return num_found / num_true if num_true else 1.0


def is_nearest(scores: Tensor, kth_scores: Tensor) -> Tensor:
    """Whether true scores (..., k) reach the true k-th score (..., 1), which are both in fp32.

    Products of the same numbers that are summed in another order differ in the last places.
    """
    return scores >= kth_scores - _FP32_SLACK * kth_scores.abs()


def _count_found(true: Tensor, slots: Tensor, valid: Tensor) -> tuple[int, int]:
    """Entries found and entries to find, for true scores (T, N) and slots (T, k)."""
    num_visible = (true > -torch.inf).sum(-1)
    wanted = num_visible.clamp(max=slots.shape[-1])
    best = true.topk(min(slots.shape[-1], true.shape[-1]), dim=-1).values
    kth = best.gather(-1, (wanted - 1).clamp(min=0).unsqueeze(-1))
    living = valid & (slots < true.shape[-1])
    slots = slots.masked_fill(~living, -1).sort(dim=-1).values
    first = torch.ones_like(living)
    first[:, 1:] = slots[:, 1:] != slots[:, :-1]
    scores = true.gather(-1, slots.clamp(min=0))
    near = is_nearest(scores, kth) & (scores > -torch.inf)
    counted = (near & first & (slots >= 0)).sum(-1).clamp(max=wanted)
    return int(counted.sum()), int(wanted.sum())
