"""kNN-LM over a document's own hidden states (Khandelwal et al. 2020).

A key is the hidden state that predicts a token, its value that token. Before each token the k
nearest keys among the document's earlier ones, by squared L2 distance d^2, say

    p_knn(x) ~ sum of exp(-d^2 / T) over those neighbors that x followed.

Key and k are the paper's: the normalized input of the last feed-forward layer, and 1,024. On
validation documents of proofs and code the final state and fewer neighbors were worse
(`docs/log.md`).

Search is exact (`memorizing.knn`): with a 1 and -|key|^2 / 2 as further components, the largest
products are the smallest distances. States are kept in bf16, as the entries of the memory are.

**Deviation:** the paper's datastore is the training text. Here, as in the memory that it is
compared with, it is what the document had before; keys give way a segment at a time.

Shapes: T tokens, B tokens of a block, k neighbors, N temperatures, d model_dim.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import pad

from memorizing.knn.index import search_heads
from memorizing.model import MemorizingTransformer
from memorizing.model.block import Norm

NUM_NEIGHBORS = 1024
TEMPERATURES = tuple(2.0 ** (-step / 2) for step in range(3, 14))
"""In units of the expected |key|^2 (`expect_square`): from 0.35 to 0.011."""
BLOCK_LEN = 512
STATE_BYTES, TOKEN_BYTES = 2, 2
"""Of a component in bf16, and of the token that followed."""


def find_norm(model: MemorizingTransformer) -> Norm:
    """The layer whose output is the key."""
    norm = model.blocks[-1].feed_forward_norm
    assert isinstance(norm, Norm)
    return norm


def expect_square(model: MemorizingTransformer) -> float:
    """The expected |key|^2: of a vector of unit mean square times the gains, the sum of gain^2."""
    return float(find_norm(model).gain.detach().double().square().sum())


@contextmanager
def record_states(model: MemorizingTransformer) -> Iterator[list[Tensor]]:
    """Inside, what the model reads appends its keys (rows, tokens, d) in bf16."""
    states: list[Tensor] = []
    handle = find_norm(model).register_forward_hook(
        lambda module, inputs, output: states.append(output.detach().bfloat16())
    )
    try:
        yield states
    finally:
        handle.remove()


def search_earlier(
    states: Tensor, k: int, capacity: int, block_len: int
) -> Iterator[tuple[int, Tensor, Tensor]]:
    """The nearest earlier states of every one, a block of them at a time.

    A state sees the `capacity` latest before its block, and those of the block before itself.

    Args:
        states: (T, d).
        k: neighbors.
        capacity: states that are kept, besides the block's own.
        block_len: states that are searched together; after each the oldest give way.

    Yields:
        Where the block begins; squared distances (B, k), nearest first, infinite where there are
        fewer than k; places (B, k) in the document, -1 there.
    """
    wide = states.float()
    squares = wide.square().sum(-1, keepdim=True)
    queries = torch.cat([wide, torch.ones_like(squares)], 1)
    keys = torch.cat([wide, squares / -2], 1)
    for start in range(0, len(states), block_len):
        end = min(start + block_len, len(states))
        oldest = max(start - capacity, 0)
        kept = keys[oldest:end]
        found = min(k, len(kept))
        scores, slots = search_heads(
            queries[None, start:end],
            kept[None],
            found,
            len(kept) - 1,
            torch.arange(end - start, 0, -1),
        )
        distances = (squares[start:end] - 2 * scores[0]).clamp(min=0)
        places = slots[0] + oldest
        is_missing = scores[0] == -torch.inf
        lacking = (0, k - found)
        distances = pad(distances.masked_fill(is_missing, torch.inf), lacking, value=torch.inf)
        yield start, distances, pad(places.masked_fill(is_missing, -1), lacking, value=-1)


def sum_shares(distances: Tensor, is_target: Tensor, temperatures: Sequence[float]) -> Tensor:
    """p_knn (B, N) of the token that came, for each temperature; 0 without a neighbor.

    Args:
        distances: squared (B, k), nearest first, infinite where there is none.
        is_target: (B, k), whether the neighbor was followed by the token.
        temperatures: in units of the distances.
    """
    behind = (distances - distances[:, :1]).nan_to_num(nan=torch.inf)
    found = []
    for temperature in temperatures:
        weights = torch.exp(-behind / temperature)
        found.append((weights * is_target).sum(1) / weights.sum(1).clamp(min=1e-30))
    return torch.stack(found, 1)


def predict(
    states: Tensor,
    tokens: NDArray[np.integer],
    capacity: int,
    temperatures: Sequence[float],
    k: int = NUM_NEIGHBORS,
    block_len: int = BLOCK_LEN,
) -> NDArray[np.float32]:
    """p_knn (T, N) of each token of a document, for each temperature.

    Args:
        states: (T, d): state i predicts token i.
        tokens: (T,).
        capacity: states that are kept.
        temperatures: in units of squared distances.
        k: neighbors.
        block_len: see `search_earlier`.
    """
    values = torch.from_numpy(tokens.astype(np.int64)).to(states.device)
    parts = []
    for start, distances, places in search_earlier(states, k, capacity, block_len):
        wanted = values[start : start + len(places), None]
        is_target = (values[places.clamp(min=0)] == wanted) & (places >= 0)
        parts.append(sum_shares(distances, is_target, temperatures).cpu().numpy())
    return np.concatenate(parts)
