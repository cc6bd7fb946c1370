"""Giving a model of `transformers` a memory, and taking it away again."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from transformers import GenerationConfig
from transformers.generation.configuration_utils import GenerationMode

from memorizing.errors import CheckpointError, ConfigError, MemorizingError, StateError
from memorizing.huggingface.attaching.decoder import Decoder
from memorizing.huggingface.attaching.families import (
    check_heads,
    check_layers,
    find_decoder,
    measure_key_norms,
)
from memorizing.huggingface.attaching.fingerprint import Fingerprint, compute_fingerprint
from memorizing.huggingface.attaching.interface import name_implementation
from memorizing.huggingface.attaching.kept_passages import check_kept
from memorizing.huggingface.attaching.memory_layer import MemoryLayer, is_open
from memorizing.huggingface.attaching.memory_settings import MemorySettings
from memorizing.huggingface.attaching.reader import Reader
from memorizing.huggingface.generating import (
    check_generation,
    check_mode,
    refuse_batching,
    refuse_code,
)
from memorizing.huggingface.releases import take_cache
from memorizing.settings import require
from memorizing.storage.tensors import check_shapes

_ATTRIBUTE = "memorizing"
"""Of a model with memory: its `Attachment`."""
_LARGEST = 3e38
"""What fp32 can hold."""


class Attachment(Reader):
    """What `add_memory` put on a model: hooks, memory layers, and what it must restore."""

    def __init__(self, model: Any, decoder: Decoder, settings: MemorySettings) -> None:
        """Put memory layers and hooks on a model. In place.

        Raises:
            ConfigError: a setting that cannot work with this model; nothing is changed.
        """
        super().__init__(decoder, settings)
        self._model = model
        self._underneath = str(model.config._attn_implementation)
        model.set_attn_implementation(name_implementation(self._underneath))
        self._before: list[tuple[Any, str, bool, object]] = []
        for layer in settings.layers:
            attention = decoder.attentions[layer]
            memory = MemoryLayer(decoder, layer, settings)
            memory.register_load_state_dict_post_hook(_allow_missing)
            memory.to(_find_device(attention, decoder.base))
            attention.add_module("memory", memory)
            self.layers[layer] = memory
        changes = {
            "_keys_to_ignore_on_save": self._list_unsaved(),
            "_prepare_generation_config": self._prepare_generation,
            "_validate_generation_mode": self._validate_generation,
            "load_custom_generate": refuse_code,
            "init_continuous_batching": refuse_batching,
        }
        for name, value in changes.items():
            self._change(model, name, value)
        base = decoder.base
        for layer in getattr(base, decoder.family.layers):
            # The cache of a call can be written again; see `CallCache`.
            self._change(layer, "_can_checkpoint_with_cache", True)
        self._handles = [
            base.register_forward_pre_hook(self._enter, with_kwargs=True),  # type: ignore[attr-defined]
            base.register_forward_hook(  # type: ignore[call-overload]
                self._leave,  # type: ignore[attr-defined]
                with_kwargs=True,
                always_call=True,
            ),
        ]

    def _change(self, owner: Any, name: str, value: object) -> None:
        """Set an attribute of a module until `remove`."""
        own = vars(owner)
        self._before.append((owner, name, name in own, own.get(name)))
        own[name] = value

    def _list_unsaved(self) -> set[str]:
        """Names that `save_pretrained` leaves out: those of before, and what memory layers have."""
        return set(getattr(self._model, "_keys_to_ignore_on_save", None) or ()) | {
            f"{name}.{tensor}"
            for name, module in self._model.named_modules()
            if isinstance(module, MemoryLayer)
            for tensor in MemoryLayer.TENSORS
        }

    def _prepare_generation(
        self, generation_config: GenerationConfig | None = None, **kwargs: Any
    ) -> tuple[GenerationConfig, dict[str, Any]]:
        """In the place of the model's `_prepare_generation_config`: prompts are read in pieces.

        Raises:
            ConfigError: a way of generating that cannot be right with a memory.
        """
        settings, inputs = type(self._model)._prepare_generation_config(
            self._model, generation_config, **kwargs
        )
        check_generation(settings, take_cache({**inputs}))
        is_told = "prefill_chunk_size" in kwargs or settings.prefill_chunk_size is not None
        # Without a cache every call reads the whole text; embeddings cannot be cut by `generate`.
        if not is_told and settings.use_cache and inputs.get("inputs_embeds") is None:
            settings.prefill_chunk_size = self.settings.segment_len
        return settings, inputs

    def _validate_generation(self, mode: GenerationMode, *args: Any) -> None:
        """In the place of the model's `_validate_generation_mode`, which knows of an assistant."""
        check_mode(mode)
        type(self._model)._validate_generation_mode(self._model, mode, *args)

    def remove(self) -> None:
        """Restore the model. In place.

        Raises:
            StateError: a memory is open.
        """
        if self.is_bound:
            raise StateError("a memory is open; leave its with block before remove_memory")
        for handle in self._handles:
            handle.remove()
        for layer in self.layers:
            del self.decoder.attentions[layer]._modules["memory"]
        for owner, name, was_there, value in reversed(self._before):
            if was_there:
                vars(owner)[name] = value
            else:
                del vars(owner)[name]
        self._model.set_attn_implementation(self._underneath)
        del self._model.__dict__[_ATTRIBUTE]

    def __getstate__(self) -> dict[str, Any]:
        """For copies and pickles of the model.

        Raises:
            StateError: a memory is open.
        """
        if self.is_bound:
            raise StateError(
                "a memory is open, which is not copied with its model; leave its with block first"
            )
        return self.__dict__

    def model(self) -> Any:
        """The model that has this memory."""
        return self._model

    def check_layers(self) -> None:
        """Refuse memory layers that another package copied, or put something around.

        Raises:
            StateError: as peft's `modules_to_save` does with attention.
        """
        found = [layer for layer in self._model.modules() if isinstance(layer, MemoryLayer)]
        if found != list(self.layers.values()):
            raise StateError(
                f"this model has {len(found)} memory layers, and add_memory made "
                f"{len(self.layers)}: they were copied or wrapped, as by modules_to_save of peft "
                "with the attention; leave attention out of it, or call remove_memory before it"
            )

    def fingerprint(self) -> Fingerprint:
        """Of what stored entries depend on, as the weights are now: a pass over them."""
        return compute_fingerprint(self.decoder, self.settings)

    def list_heads(self) -> dict[str, Tensor]:
        """Gates, scales and norms of all memory layers by name; by reference."""
        return {
            f"layers.{number}.{name}": tensor.detach()
            for number, layer in self.layers.items()
            for name, tensor in layer.state_dict().items()
        }

    def dump_heads(self) -> dict[str, dict[str, list[float]]]:
        """The same by layer and name, for JSON."""
        return {
            str(number): {name: tensor.tolist() for name, tensor in layer.state_dict().items()}
            for number, layer in self.layers.items()
        }

    def load_heads(
        self,
        tensors: Mapping[str, Tensor],
        where: str,
        error: type[MemorizingError] = CheckpointError,
    ) -> None:
        """Take over what `list_heads` gave. In place.

        Args:
            tensors: by name.
            where: they are from, for messages.
            error: what is raised about them.

        Raises:
            StateError: a memory is open, whose heads were settled when it was opened.
            MemorizingError: of the given class: of other layers or numbers of heads, or not finite.
        """
        if self.is_bound:
            raise StateError(
                "a memory is open, and which heads read it was settled when it was opened; leave "
                "its with block before loading gates"
            )
        mine = self.list_heads()
        check_shapes(where, tensors, mine, error, "load it onto the model that it is of")
        check_finite(tensors, where, error)
        with torch.no_grad():
            for name, tensor in mine.items():
                tensor.copy_(tensors[name])


def describe_base(inner: Any) -> dict[str, Any]:
    """What a saved adapter says of the model that it is of."""
    config = inner.config
    return {
        "model_type": str(config.model_type),
        "num_layers": int(config.num_hidden_layers),
        "hidden_size": int(config.hidden_size),
        "name": str(getattr(config, "_name_or_path", "") or ""),
    }


def check_finite(tensors: Mapping[str, Tensor], where: str, error: type[MemorizingError]) -> None:
    """Refuse what was saved with NaN or infinite numbers.

    Raises:
        MemorizingError: of the given class.
    """
    for name, tensor in tensors.items():
        if not bool(tensor.isfinite().all()):
            raise error(
                f"{where} has NaN or infinite numbers in {name}; save it again, or copy the whole"
            )


def parse_heads(values: Any) -> dict[str, Tensor]:
    """What `Attachment.dump_heads` gave, as `Attachment.load_heads` takes it.

    What is no list of numbers is left out: `load_heads` then misses it.
    """
    return {
        f"layers.{number}.{name}": torch.tensor(numbers, dtype=torch.float32)
        for number, heads in (values.items() if isinstance(values, dict) else ())
        for name, numbers in (heads.items() if isinstance(heads, dict) else ())
        if isinstance(numbers, list)
        and all(type(one) in (int, float) and abs(one) < _LARGEST for one in numbers)
    }


def list_open_heads(values: Any) -> dict[str, list[int]]:
    """Per layer the heads that read, of what `Attachment.dump_heads` gave, as in JSON."""
    return {
        name.removeprefix("layers.").removesuffix(".bias"): is_open(tensor)
        .nonzero()
        .flatten()
        .tolist()
        for name, tensor in parse_heads(values).items()
        if name.endswith(".bias")
    }


def describe_heads(heads: Mapping[Any, Sequence[int]]) -> str:
    """Heads per layer, as words."""
    return "; ".join(
        f"layer {layer}, heads {', '.join(map(str, numbers))}" for layer, numbers in heads.items()
    )


def _find_device(attention: nn.Module, base: Any) -> torch.device:
    """Where a layer computes; where its weights are quantized, they are no parameters."""
    held = itertools.chain(attention.parameters(), attention.buffers())
    return next(held, base.get_input_embeddings().weight).device


def _allow_missing(module: Any, keys: Any) -> None:
    """Let weights be loaded that were saved without the memory. In place."""
    names = {f"memory.{name}" for name in module.TENSORS}
    keys.missing_keys[:] = [
        key for key in keys.missing_keys if ".".join(key.split(".")[-2:]) not in names
    ]


@torch.inference_mode(False)  # what is made here may be trained later
def add_memory(
    model: Any,
    layers: Sequence[int] | None = None,
    *,
    heads: Mapping[int, Sequence[int]] | None = None,
    window: int = 512,
    segment_len: int | None = None,
    distance: int | None = None,
    **settings: Any,
) -> Any:
    """Give a causal language model of `transformers` a memory. In place; returns the model.

    Nothing is stored yet, and the logits of texts within the window are exactly those of before:
    see `open_memory`. The model's own weights are not changed, and `remove_memory` restores it.
    `generate` works greedily and by sampling, and reads prompts in pieces of `segment_len`; beam
    search and assisted decoding are refused.
    `save_pretrained` saves the model without its memory.

    Which layers and heads can use a memory differs from model to model and decides whether it
    helps; `calibrate` finds them out.

    Keys are stored free of rotary positions. GPT-2 adds its positions to the embeddings, so its
    stored keys hold where they were read.

    Args:
        model: of a family in `FAMILIES`, or one that works alike, which is tried out.
        layers: which layers read a memory, counted from 0; None takes those of `heads`, or the one
            at three fifths.
        heads: per layer, the heads of queries that read it; in other layers all do.
        window: tokens that local attention sees, and the cache keeps.
        segment_len: the memory's clock; by default the window, or half of it where passages need
            the positions.
        distance: how far before a query retrieved entries seem to stand; by default the window.
        settings: as in `MemorySettings`.

    Raises:
        ConfigError: a model, layer, head or setting that cannot work.
    """
    inner = unwrap(model)
    if find_attachment(inner) is not None:
        raise ConfigError("this model has a memory; call remove_memory(model) first")
    if any(weight.is_meta for weight in inner.parameters()):
        raise ConfigError(
            "weights of this model are on the meta device, as with offloading; a memory is added "
            "to a model that is loaded whole: leave out device_map, or give it GPUs alone"
        )
    decoder = find_decoder(inner)
    num_layers = len(decoder.attentions)
    heads = {} if heads is None else heads
    if layers is None:
        layers = list(heads) or [num_layers * 3 // 5]
    chosen = tuple(sorted(int(layer) for layer in layers))
    check_layers(chosen, num_layers)
    check_heads(heads, chosen, decoder.shapes[chosen[0]][0])
    parsed = MemorySettings(
        chosen,
        window=window,
        segment_len=window if segment_len is None else segment_len,
        distance=window if distance is None else distance,
        **settings,
    )
    if parsed.finds_passages:
        given = settings.keys() if segment_len is None else {*settings, "segment_len"}
        parsed = fit_room(parsed, decoder, given)
    shapes = {decoder.shapes[layer] for layer in chosen}
    require(len(shapes) == 1, "layers", list(chosen), "layers with equally many and long heads")
    if parsed.keep == "entries":
        check_kept(decoder, parsed)
    attachment = inner.__dict__[_ATTRIBUTE] = Attachment(inner, decoder, parsed)
    try:
        if parsed.search == "normalized":
            measure_key_norms(attachment)
        for layer, open_heads in heads.items():
            attachment.layers[layer].close_all_but(open_heads)
    except BaseException:
        attachment.remove()
        raise
    return model


def fit_room(settings: MemorySettings, decoder: Decoder, given: Collection[str]) -> MemorySettings:
    """Settings for a model that has few positions, as far as they are not `given`.

    Segments become shorter, then passages fewer, then these shorter; see `Positions` for what a
    window needs.
    """
    least = 1 if decoder.family.positions == "learned" else 2

    def count_left(segment_len: int) -> int:
        segments = max(least, -(-settings.window // segment_len))
        return decoder.max_positions - segments * segment_len - 1

    shorter = -(-settings.segment_len // 2)
    one = (1 + settings.num_again) * settings.passage_len
    if "segment_len" not in given and count_left(settings.segment_len) < one:
        settings = replace(settings, segment_len=shorter)
    left = count_left(settings.segment_len)
    if "num_passages" not in given:
        most = max(1, left // settings.passage_len - settings.num_again)
        settings = replace(settings, num_passages=min(settings.num_passages, most))
    if "passage_len" not in given:
        most = max(1, left // (settings.num_passages + settings.num_again))
        settings = replace(settings, passage_len=min(settings.passage_len, most))
    return settings


def remove_memory(model: Any) -> Any:
    """Take away what `add_memory` gave: the model is as before. In place; returns the model.

    Raises:
        ConfigError: the model has no memory.
        StateError: a memory is open.
    """
    get_attachment(model).remove()
    return model


def get_attachment(model: Any) -> Attachment:
    """What `add_memory` put on a model.

    Raises:
        ConfigError: the model has no memory.
    """
    attachment = find_attachment(model)
    if attachment is None:
        raise ConfigError(
            f"this {type(model).__name__} has no memory; call memorizing.add_memory(model) first"
        )
    return attachment


def find_attachment(model: Any) -> Attachment | None:
    """What `add_memory` put on a model, if it did."""
    return unwrap(model).__dict__.get(_ATTRIBUTE)


def unwrap(model: Any) -> Any:
    """The model inside of what peft, `torch.compile`, DDP and DataParallel wrap around it.

    peft puts its layers into that model itself, so that it computes with them either way.
    """
    peft = sys.modules.get("peft")
    while True:
        if peft is not None and isinstance(model, peft.PeftModel):
            model = model.get_base_model()
        elif isinstance(model, (nn.DataParallel, DistributedDataParallel)):
            model = model.module
        elif isinstance(model, nn.Module) and "_orig_mod" in model._modules:
            model = model._modules["_orig_mod"]
        else:
            return model
