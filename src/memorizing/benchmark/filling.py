"""Full states: what every benchmark of the model starts from."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from memorizing.loss import sum_nats
from memorizing.memory import Memory
from memorizing.model import MemorizingTransformer, ModelState
from memorizing.model.block import normalize

_CHUNK_LEN = 8192
"""Entries appended at once."""


def fill_state(
    model: MemorizingTransformer,
    tokens: Tensor,
    capacity: int,
    index: str = "exact",
    keys: Tensor | None = None,
) -> ModelState:
    """A state of one row at the start of a segment, whose cache and memories are full.

    Args:
        model: read without gradient.
        tokens: (1, segment_len): read until the cache is full.
        capacity: of every memory; 0 is no memory.
        index: what searches the memories.
        keys: as in `fill_memory`.
    """
    state = model.init_state(1, capacity, index=index)
    with torch.no_grad():
        for _ in range(-(-model.config.window // model.config.segment_len)):
            state = model(tokens, state).state.commit()
    # The clock of a memory stands where its row stands: at the end of a segment.
    num_entries = -(-capacity // state.segment_len) * state.segment_len
    for memory in state.memories.values():
        fill_memory(memory, num_entries, keys)
    return replace(state, position=state.position + num_entries, generation=None)


def fill_memory(memory: Memory, num_entries: int, keys: Tensor | None = None) -> None:
    """Append entries: random values, and keys that are random and of length 1, or given.

    Changes the memory in place.

    Args:
        memory: of one row.
        num_entries: how many are appended.
        keys: (h, N, D), appended in their order, and from the first again after the last; fewer
            heads than the memory's are repeated.
    """
    _, num_heads, _, head_dim = memory.keys.shape
    for start in range(0, num_entries, _CHUNK_LEN):
        stop = min(start + _CHUNK_LEN, num_entries)
        shape = (1, num_heads, stop - start, head_dim)
        if keys is None:
            chunk = normalize(torch.randn(shape))
        else:
            chosen = keys[:, torch.arange(start, stop) % keys.shape[1]]
            chunk = chosen[torch.arange(num_heads) % keys.shape[0]].unsqueeze(0)
        memory.append(chunk, torch.randn(shape))


def run_step(model: MemorizingTransformer, state: ModelState, tokens: Tensor) -> ModelState:
    """A training step without the optimizer: forward, loss, backward, commit.

    Args:
        model: gets gradients.
        state: at the start of a segment; its memories are written in place.
        tokens: (1, segment_len + 1): the segment, and the targets one token on.
    """
    output = model(tokens[:, :-1], state)
    targets = tokens[:, 1:]
    loss = sum_nats(output.logits, targets, torch.ones_like(targets, dtype=torch.bool))
    (loss / targets.numel()).backward()
    return output.state.commit()
