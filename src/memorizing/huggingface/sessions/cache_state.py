"""Everything that belongs to a text being read, as tensors by name: to save it and go on later."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from memorizing.errors import CheckpointError, StateError
from memorizing.huggingface.attaching.attachment import Attachment
from memorizing.huggingface.attaching.window_cache import find_text

_PARTS = ("keys", "values", "sink_keys", "sink_values")


def dump_cache(attachment: Attachment, cache: DynamicCache) -> dict[str, Tensor] | None:
    """The cache, memories and clock of one text, by reference; None before its first token.

    Call it after `commit`, at the end of a segment.

    Raises:
        StateError: entries wait for the end of their segment.
    """
    text = find_text(cache)
    if text.history is None:
        return None
    history = attachment.find_history(cache)
    if any(state.staged for state in history.states.values()):
        raise StateError(
            f"this text is in the middle of a segment, at position {history.position.tolist()}; "
            "save it after a whole segment and its commit"
        )
    tensors = {"position": history.position, "shift": text.shift}
    for number, layer in enumerate(cache.layers):
        held: Any = layer
        tensors[f"layers.{number}.length"] = torch.tensor([held.cumulative_length])
        for part in _PARTS:
            value = getattr(held, part, None)
            if isinstance(value, Tensor):
                tensors[f"layers.{number}.{part}"] = value
    for number, state in history.states.items():
        keys = history.open_heads[number].key_heads if state.memories else ()
        tensors[f"memories.{number}.key_heads"] = torch.tensor(keys, dtype=torch.int64)
        for memory in state.memories.values():
            for name, value in memory.state_dict().items():
                tensors[f"memories.{number}.{name}"] = value
    return tensors


def load_cache(attachment: Attachment, tensors: dict[str, Tensor]) -> DynamicCache:
    """A cache that goes on where `dump_cache` was called.

    Raises:
        CheckpointError: the tensors are of another model, memory or precision.
    """
    device = attachment.decoder.base.get_input_embeddings().weight.device
    cache = attachment.make_cache()
    try:
        position = tensors["position"].cpu()
        history = attachment.start_history(cache, len(position))
        for number, state in history.states.items():
            keys = history.open_heads[number].key_heads if state.memories else ()
            saved = tensors[f"memories.{number}.key_heads"].tolist()
            if saved != list(keys):
                raise CheckpointError(
                    f"the saved cache remembers heads of keys {saved} of layer {number}, and this "
                    f"model reads {list(keys)}; go on with the gates it was saved with"
                )
            for memory in state.memories.values():
                names = memory.state_dict()
                parts = {name: tensors[f"memories.{number}.{name}"] for name in names}
                memory.load_state_dict({n: t.to(names[n].device) for n, t in parts.items()})
            history.states[number] = replace(state, position=position.clone())
        for number, layer in enumerate(cache.layers):
            held: Any = layer
            found = {
                part: tensors[f"layers.{number}.{part}"].to(device)
                for part in _PARTS
                if f"layers.{number}.{part}" in tensors
            }
            held.lazy_initialization(found["keys"], found["values"])
            for part, value in found.items():
                setattr(held, part, value)
            held.cumulative_length = int(tensors[f"layers.{number}.length"])
    except (KeyError, RuntimeError) as error:
        raise CheckpointError(
            f"the saved cache does not fit this model: {error}; go on with the model, memory and "
            "precision it was saved with"
        ) from error
    find_text(cache).shift = tensors["shift"].to(torch.int64).cpu()
    return cache
