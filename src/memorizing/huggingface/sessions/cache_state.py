"""Everything that belongs to a text being read, as tensors by name: to save it and go on later."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from memorizing.errors import CheckpointError, StateError
from memorizing.huggingface.attaching.attachment import Attachment
from memorizing.huggingface.attaching.window_cache import TextState, find_text

_HEADS = "memories.{}.key_heads"
_QUERIES = "queries.{}"
_PARTS = ("keys", "values", "sink_keys", "sink_values")


def dump_cache(attachment: Attachment, cache: DynamicCache) -> dict[str, Tensor] | None:
    """The cache, memories and clock of one text, by reference; None before its first token.

    Call it after `commit`, at the end of a segment. The passages in sight are not among them: they
    are found anew by what the text asked for last.

    Raises:
        StateError: entries wait for the end of their segment.
    """
    text = find_text(cache)
    if text.history is None:
        return None
    history = attachment.find_history(cache)
    if history.staged:
        raise StateError(
            f"this text is in the middle of a segment, at position {history.position.tolist()}; "
            "save it after a whole segment and its commit"
        )
    tensors = history.state_dict() | {"shift": text.shift}
    if text.queries_valid is not None:
        tensors |= {_QUERIES.format(layer): asked for layer, asked in text.queries.items()}
        tensors |= {"queries_valid": text.queries_valid, "ids": text.list_ids(0)}
        tensors["room_len"] = torch.tensor([text.room_len])
    for number, layer in enumerate(cache.layers):
        held: Any = layer
        tensors[f"layers.{number}.length"] = torch.tensor([held.cumulative_length])
        for part in _PARTS:
            value = getattr(held, part, None)
            if isinstance(value, Tensor):
                tensors[f"layers.{number}.{part}"] = value
    for number, heads in _list_heads(text).items():
        tensors[_HEADS.format(number)] = torch.tensor(heads, dtype=torch.int64)
    return tensors


def load_cache(attachment: Attachment, tensors: dict[str, Tensor]) -> DynamicCache:
    """A cache that goes on where `dump_cache` was called.

    Raises:
        CheckpointError: the tensors are of another model, memory or precision.
    """
    device = attachment.decoder.base.get_input_embeddings().weight.device
    cache = attachment.make_cache()
    try:
        text = attachment.start_text(cache, len(tensors["position"]))
        assert text.history is not None
        for number, heads in _list_heads(text).items():
            saved = tensors[_HEADS.format(number)].tolist()
            if saved != heads:
                raise CheckpointError(
                    f"the saved cache remembers heads of keys {saved} of layer {number}, and this "
                    f"model reads {heads}; go on with the gates it was saved with"
                )
        names = text.history.state_dict()
        text.history = text.history.load_state_dict({name: tensors[name].clone() for name in names})
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
        if "queries_valid" in tensors:
            text.queries = {
                layer: tensors[_QUERIES.format(layer)].to(device) for layer in text.open_heads
            }
            text.queries_valid = tensors["queries_valid"]
            text.pieces = [(tensors["ids"][None], torch.ones_like(tensors["ids"][None]).bool())]
            text.room_len = int(tensors["room_len"])
    except (KeyError, RuntimeError, StateError) as error:
        raise CheckpointError(
            f"the saved cache does not fit this model: {error}; go on with the model, memory and "
            "precision it was saved with"
        ) from error
    text.shift = tensors["shift"].to(torch.int64).cpu()
    return cache


def _list_heads(text: TextState) -> dict[int, list[int]]:
    """Per memory layer, the heads of keys that the text's memory has."""
    assert text.history is not None
    return {
        number: list(heads.key_heads) if number in text.history.memories else []
        for number, heads in text.open_heads.items()
    }
