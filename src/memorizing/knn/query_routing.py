"""Which cells of an inverted file to search for a query, learned from queries.

Cells are placed by the keys. Queries are distributed differently, so that the center of a cell is
not the best guide to whether it holds their neighbors. Softmax regression on a sample of queries
gives each cell a vector that is (Vecchiato, Lucchese, Nardini and Bruch 2024, "A Learning-to-Rank
Formulation of Clustering-Based Approximate Nearest Neighbor Search").

Placing the cells themselves by queries, or by queries and keys, lowered the recall at equal work.
"""

from __future__ import annotations

import numpy as np
import torch
from torch.nn import functional

_NUM_NEIGHBORS = 32
_NUM_STEPS = 50
_LEARNING_RATE = 0.1
_SHARPNESS = 8.0
"""What unit centers are multiplied by at the start: softmax of cosines would be flat."""
_TILE_BYTES = 64 * 2**20


def learn_routing(
    centers: np.ndarray, keys: np.ndarray, cells: np.ndarray, queries: np.ndarray
) -> np.ndarray:
    """Vectors whose inner products with a query tell the cells that hold its nearest keys.

    They minimize the cross entropy of softmax(vectors @ query) against the shares of the query's
    32 nearest keys that lie in each cell, starting at the centers. Deterministic.

    Args:
        centers: (L, D) fp32, of unit length.
        keys: (n, D).
        cells: (n,) int64: the cell of each key.
        queries: (m, D).

    Returns:
        (L, D) fp32.
    """
    # Memories are written to without gradient, or in inference mode.
    with torch.inference_mode(False), torch.enable_grad():
        asked = functional.normalize(torch.from_numpy(queries), dim=-1)
        shares = _count_shares(asked, torch.from_numpy(keys), torch.from_numpy(cells), len(centers))
        vectors = (_SHARPNESS * torch.from_numpy(centers)).requires_grad_()
        optimizer = torch.optim.Adam([vectors], lr=_LEARNING_RATE)
        for _ in range(_NUM_STEPS):
            optimizer.zero_grad()
            functional.cross_entropy(asked @ vectors.T, shares).backward()
            optimizer.step()
        return vectors.detach().numpy()


def _count_shares(
    queries: torch.Tensor, keys: torch.Tensor, cells: torch.Tensor, num_cells: int
) -> torch.Tensor:
    """(m, L): the share of each query's nearest keys that lies in each cell."""
    k = min(_NUM_NEIGHBORS, len(keys))
    shares = torch.zeros(len(queries), num_cells)
    step = max(1, _TILE_BYTES // (4 * len(keys)))
    for start in range(0, len(queries), step):
        part = slice(start, start + step)
        nearest = (queries[part] @ keys.T).topk(k, dim=-1).indices
        shares[part].scatter_add_(1, cells[nearest], torch.full(nearest.shape, 1.0 / k))
    return shares
