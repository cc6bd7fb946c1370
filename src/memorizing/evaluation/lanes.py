"""A long document read at many places at once, where entries do not depend on what is retrieved.

A segment without XL cache sees nothing of the segments before it but the last tokens' queries and
keys, which short convolutions and smeared keys mix in. They reach back by a segment a layer at
most. So a document can be cut into *lanes* that are read side by side, as if they were documents:
each begins a few segments early, to warm up, and entries of these segments are dropped. The entries
are the same as when segments are read one after another, which on a GPU takes as many small steps
as there are segments.

Shapes: B rows, L tokens of a row, N lanes of a row.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from memorizing.config import ModelConfig
from memorizing.devices import send
from memorizing.model import MemorizingTransformer, ModelState

LANE_SEGMENTS = 32
"""Segments that a lane adds: many times those it warms up on, few enough to need little memory
beside that of the document."""
_TOKENS_ON_CPU, _TOKENS_ON_GPU = 2**12, 2**16
"""Tokens of a step that keep a device busy."""


def count_warm_up(config: ModelConfig) -> int | None:
    """Segments that a lane must read before its entries are right; None: lanes never are."""
    if config.xl_cache or len(config.memory_layers) > 1:
        return None
    # Where nothing is known of what stands before segment 0, layer l is right from l + 1 on.
    return config.num_layers if config.conv_len or config.smear_keys else 0


@torch.no_grad()
def read_in_lanes(
    model: MemorizingTransformer, tokens: Tensor, state: ModelState
) -> tuple[ModelState, int]:
    """Read the beginning of documents with the memory closed: as many whole rounds as there are.

    Args:
        model: its memory, if any, is in one layer.
        tokens: (B, L), whole documents.
        state: fresh; its memories are written.

    Returns:
        The state, and how many of the L tokens it has read: whole segments, 0 where documents are
        too short or the model's segments depend on more of what stands before them.
    """
    segment_len, num_rows = model.config.segment_len, tokens.shape[0]
    warm_up = count_warm_up(model.config)
    if warm_up is None:
        return state, 0
    is_cpu = model.embedding.weight.device.type == "cpu"
    most_lanes = (_TOKENS_ON_CPU if is_cpu else _TOKENS_ON_GPU) // (num_rows * segment_len)
    num_segments, done = tokens.shape[1] // segment_len, 0
    while True:
        begin = max(done - warm_up, 0)
        num_lanes = min(most_lanes, (num_segments - begin - warm_up) // LANE_SEGMENTS)
        if num_lanes < 2:
            return state, done * segment_len
        end = begin + warm_up + num_lanes * LANE_SEGMENTS
        part = tokens[:, begin * segment_len : end * segment_len]
        state = _read_round(model, part, state, num_lanes, (done - begin) * segment_len)
        done = end


def _read_round(
    model: MemorizingTransformer, tokens: Tensor, state: ModelState, num_lanes: int, num_known: int
) -> ModelState:
    """The state after tokens (B, L) in lanes; the first `num_known` of them it has already."""
    segment_len, num_rows = model.config.segment_len, tokens.shape[0]
    device = model.embedding.weight.device
    added = LANE_SEGMENTS * segment_len
    warm_up = tokens.shape[1] - num_lanes * added
    lanes = tokens.unfold(1, warm_up + added, added).flatten(0, 1)
    capacity = lanes.shape[1] if state.memories else 0
    read = model.init_state(len(lanes), capacity, index="exact")
    for part in lanes.split(segment_len, 1):
        read = model(send(part, device), read, memory_open=False).state.commit()
    for layer, memory in state.memories.items():
        stored = read.memories[layer]
        keys, values = (
            entries.unflatten(0, (num_rows, num_lanes)) for entries in (stored.keys, stored.values)
        )
        for lane in range(num_lanes):
            first = warm_up if lane else num_known
            of_lane = slice(lane, None, num_lanes)
            read_tokens = None if stored.tokens is None else stored.tokens[of_lane, first:]
            memory.append(keys[:, lane, :, first:], values[:, lane, :, first:], tokens=read_tokens)
    last = torch.arange(num_lanes - 1, len(lanes), num_lanes, device=device)
    return replace(
        state,
        position=state.position + tokens.shape[1] - num_known,
        recent=tuple(part[last] for part in read.recent),
        generation=None,
    )
