"""Whether a search is right: no speed is reported of one that is not.

Shapes: H heads, T queries, N entries, D head_dim, k neighbors.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from memorizing.config import ModelConfig
from memorizing.errors import MemorizingError
from memorizing.index_settings import ExactSettings, IndexSettings
from memorizing.knn import Neighbors
from memorizing.knn.recall import is_nearest
from memorizing.memory import Memory
from memorizing.model import ModelState
from memorizing.model.block import normalize

_QUERIES_AT_ONCE = 64
_FP32_SLACK = 1e-5
"""Relative: products of the same numbers, summed in another order."""


@dataclass(frozen=True)
class Truth:
    """Queries (H, T, D) and keys (H, N, D) with the k-th largest of the products in fp32."""

    queries: Tensor
    keys: Tensor
    num_neighbors: int
    kth_scores: Tensor
    """(H, T) fp32."""

    def score(self, slots: Tensor) -> Tensor:
        """Inner products in fp32 (H, T, k) of the queries with the keys of these slots."""
        found = [
            torch.einsum("td,tkd->tk", queries.float(), keys[chosen].float())
            for queries, keys, chosen in zip(self.queries, self.keys, slots, strict=True)
        ]
        return torch.stack(found)

    def measure_recall(self, slots: Tensor, valid: Tensor | None = None) -> float:
        """Share of the k nearest that are among the slots (H, T, k), each of which appears once.

        An entry counts where its score is at least the k-th true one, so that ties are no misses.
        """
        hits = is_nearest(self.score(slots), self.kth_scores.unsqueeze(-1))
        if valid is not None:
            hits &= valid
        return float(hits.sum()) / (self.kth_scores.numel() * self.num_neighbors)


def compute_truth(queries: Tensor, keys: Tensor, num_neighbors: int) -> Truth:
    """Score every stored key in fp32, a few queries at a time, and sort in full."""
    kth = torch.empty(queries.shape[:2])
    for head, head_keys in enumerate(keys):
        transposed = head_keys.float().T
        for start in range(0, queries.shape[1], _QUERIES_AT_ONCE):
            part = slice(start, start + _QUERIES_AT_ONCE)
            scores = queries[head, part].float() @ transposed
            kth[head, part] = scores.topk(num_neighbors, dim=-1).values[:, -1]
    return Truth(queries, keys, num_neighbors, kth)


def measure_rounding(scores: Tensor, dtype: torch.dtype) -> Tensor:
    """One unit in the last place of scores as `dtype` holds them: 2^(floor(log2 |s|)) * eps."""
    exponent = torch.frexp(scores.float()).exponent - 1
    return torch.ldexp(torch.full_like(scores, torch.finfo(dtype).eps), exponent)


def check_exact(name: str, slots: Tensor, truth: Truth, dtype: torch.dtype) -> None:
    """Refuse slots (H, T, k) of which one scores less than the k-th true score less one rounding.

    Args:
        name: of the method, for the message.
        slots: what it returned.
        truth: what is right.
        dtype: of the scores it selected by; fp32 leaves no rounding but that of the sum.

    Raises:
        MemorizingError: a neighbor was missed, or a slot appears twice for one query.
    """
    _check_unique(name, slots, torch.ones_like(slots, dtype=torch.bool), truth)
    slack = measure_rounding(truth.kth_scores, dtype) + _FP32_SLACK * truth.kth_scores.abs()
    missing = truth.kth_scores - slack - truth.score(slots).amin(-1)
    if not bool((missing <= 0).all()):
        raise _make_error(
            name, truth, f"an entry that scores {float(missing.max()):.3g} too little to be found"
        )


def check_neighbors(name: str, found: Neighbors, truth: Truth) -> None:
    """Refuse results (1, H, T, k) that are not entries with their true scores, best first.

    Raises:
        MemorizingError: a slot that is no entry or appears twice for one query, a score that is
            not the product of the query and the stored key, or scores out of order.
    """
    slots, scores, valid = found.slots[0], found.scores[0].float(), found.valid[0]
    _check_unique(name, slots, valid, truth)
    true_scores = truth.score(slots)
    slack = measure_rounding(true_scores, found.scores.dtype) + _FP32_SLACK
    is_true = (scores - true_scores).abs() <= slack  # False for NaN
    if not bool(is_true[valid].all()):
        raise _make_error(name, truth, "a score that is not that of its slot")
    ordered = scores.masked_fill(~valid, -torch.inf)
    if bool((ordered[..., 1:] > ordered[..., :-1]).any()):
        raise _make_error(name, truth, "scores that are not sorted")


def check_index(settings: IndexSettings, found: Neighbors, truth: Truth) -> None:
    """Refuse wrong results of an index; of an exact one also such as miss a neighbor.

    Raises:
        MemorizingError: as `check_neighbors` and `check_exact`.
    """
    name = str(settings)
    check_neighbors(name, found, truth)
    if isinstance(settings, ExactSettings):
        check_exact(name, found.slots[0], truth, torch.float32)


def _check_unique(name: str, slots: Tensor, valid: Tensor, truth: Truth) -> None:
    size = truth.keys.shape[1]
    if bool(((slots < 0) | (slots >= size))[valid].any()):
        raise _make_error(name, truth, f"a slot that is not one of 0 to {size - 1:,}")
    # What is missing gets a number of its own per place, so that it equals nothing.
    places = torch.arange(size, size + slots.shape[-1]).expand_as(slots)
    ordered = torch.where(valid, slots, places).sort(dim=-1).values
    if bool((ordered[..., 1:] == ordered[..., :-1]).any()):
        raise _make_error(name, truth, "the same slot twice")


def _make_error(name: str, truth: Truth, what: str) -> MemorizingError:
    return MemorizingError(
        f"{name} returned {what} among {truth.keys.shape[1]:,} entries on this machine, so no "
        "speed is reported; please open an issue with the output of `memorizing info machine`"
    )


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
