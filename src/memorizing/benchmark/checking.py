"""Whether what searches a memory is right, before any speed of it is told."""

from __future__ import annotations

import torch
from torch import Tensor

from memorizing.benchmark.verification import check_index, compute_truth
from memorizing.config import ModelConfig
from memorizing.knn import Neighbors
from memorizing.memory import Memory
from memorizing.model import ModelState
from memorizing.model.block import normalize

_NUM_CHECKED = 16
"""Random queries per head."""


def check_state(state: ModelState, config: ModelConfig) -> float:
    """The lowest recall of a state's memories, on random queries.

    Raises:
        MemorizingError: a search gives wrong results.
    """
    shape = (config.num_heads, _NUM_CHECKED, config.head_dim)
    return min(
        check_memory(memory, normalize(torch.randn(shape)), config.num_neighbors)
        for memory in state.memories.values()
    )


def check_memory(memory: Memory, queries: Tensor, num_neighbors: int) -> float:
    """Compare what the index of a memory finds with a full sort in fp32. Changes nothing.

    Every query is searched for alone, as in decoding, and all of them together, as in training.

    Args:
        memory: of one row, full.
        queries: (H, T, D).
        num_neighbors: k.

    Returns:
        Recall of the searches one by one: the share of the k nearest that is found.

    Raises:
        MemorizingError: scores that are not those of the entries found, an entry found twice, or
            exact search that misses one.
    """
    queries = queries.to(memory.keys.dtype)
    truth = compute_truth(queries, memory.keys[0], num_neighbors)
    together = memory.index.search(queries.unsqueeze(0), memory.stored_keys, num_neighbors)
    apart = _join(
        [
            memory.index.search(query.unsqueeze(0), memory.stored_keys, num_neighbors)
            for query in queries.split(1, dim=1)
        ]
    )
    for found in (together, apart):
        check_index(memory.index.settings, found, truth)
    return truth.measure_recall(apart.slots[0], apart.valid[0])


def _join(parts: list[Neighbors]) -> Neighbors:
    return Neighbors(
        torch.cat([part.slots for part in parts], 2),
        torch.cat([part.scores for part in parts], 2),
        torch.cat([part.valid for part in parts], 2),
    )
