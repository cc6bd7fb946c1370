"""What a model with memory has set otherwise, in the places that `transformers` has for it."""

from __future__ import annotations

import copy
from typing import Any

from transformers import GenerationConfig
from transformers.generation.configuration_utils import GenerationMode

from memorizing.errors import ConfigError
from memorizing.huggingface.attaching.families import Decoder
from memorizing.huggingface.attaching.interface import name_implementation
from memorizing.huggingface.attaching.memory_layer import MemoryLayer

_MODES = [GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE]
"""One token after another, each row by itself: what beams exchange and assistants take back is in
memory already."""
_NOTHING = object()


class ReadInPieces(GenerationConfig):
    """How a model with memory generates: prompts are read in pieces. That is not saved with it."""

    def to_diff_dict(self) -> dict[str, Any]:
        """What is saved."""
        values = super().to_diff_dict()
        values.pop("prefill_chunk_size", None)
        return values


class ModelChanges:
    """Attention, generation and saving of a model with memory, and how they were before."""

    def __init__(self, model: Any, decoder: Decoder, segment_len: int) -> None:
        """Change a model. In place.

        Raises:
            ConfigError: attention that runs by something that is not known; nothing is changed.
        """
        self._model = model
        self._underneath = str(model.config._attn_implementation)
        name = name_implementation(self._underneath)
        if self._underneath == "eager" and getattr(model.config, "reorder_and_upcast_attn", False):
            raise ConfigError(
                "reorder_and_upcast_attn is true, which works by itself only; load the model with "
                "attn_implementation='sdpa'"
            )
        model.set_attn_implementation(name)
        if model.config._attn_implementation != name:
            raise ConfigError(
                f"a {type(model).__name__} does not let its attention be set; it cannot be given a "
                "memory"
            )
        self._before: list[tuple[Any, str, object]] = []
        self._set(model, "_supported_generation_modes", _MODES)
        for layer in getattr(decoder.base, decoder.family.layers):
            # The cache of a call can be written again; see `CallCache`.
            self._set(layer, "_can_checkpoint_with_cache", True)
        self._generation = getattr(model, "generation_config", None)
        self._pieces = None
        if self._generation is not None:
            self._pieces = ReadInPieces()
            vars(self._pieces).update(copy.deepcopy(vars(self._generation)))
            self._pieces.prefill_chunk_size = segment_len
            model.generation_config = self._pieces

    def leave_memory_unsaved(self) -> None:
        """Let `save_pretrained` leave out what memory layers have. In place."""
        ignored = set(getattr(self._model, "_keys_to_ignore_on_save", None) or ())
        for name, module in self._model.named_modules():
            if isinstance(module, MemoryLayer):
                ignored |= {f"{name}.{tensor}" for tensor in MemoryLayer.TENSORS}
        self._set(self._model, "_keys_to_ignore_on_save", ignored)

    def revert(self) -> None:
        """Make the model what it was; what was set on its `generation_config` since stays."""
        model = self._model
        for owner, name, value in reversed(self._before):
            if value is _NOTHING:
                del vars(owner)[name]
            else:
                vars(owner)[name] = value
        model.set_attn_implementation(self._underneath)
        if self._generation is not None and model.generation_config is self._pieces:
            chunk_size = self._generation.prefill_chunk_size
            vars(self._generation).update(vars(self._pieces))
            self._generation.prefill_chunk_size = chunk_size
            model.generation_config = self._generation

    def _set(self, owner: Any, name: str, value: object) -> None:
        self._before.append((owner, name, vars(owner).get(name, _NOTHING)))
        vars(owner)[name] = value
