"""Giving a model of `transformers` a memory, and taking it away again."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import Cache

from memorizing.errors import ConfigError, StateError
from memorizing.huggingface.attaching.calls import (
    CallInputs,
    Windows,
    check_history,
    list_valid,
    take_step,
)
from memorizing.huggingface.attaching.families import (
    FAMILIES,
    Decoder,
    check_heads,
    check_layers,
    choose_dtype,
    find_decoder,
)
from memorizing.huggingface.attaching.fingerprint import Fingerprint, compute_fingerprint
from memorizing.huggingface.attaching.interface import STEP
from memorizing.huggingface.attaching.memory_layer import MemoryLayer
from memorizing.huggingface.attaching.memory_settings import MemorySettings
from memorizing.huggingface.attaching.model_changes import ModelChanges
from memorizing.huggingface.attaching.open_heads import OpenHeads
from memorizing.huggingface.attaching.probing import check_family, measure_key_norms
from memorizing.huggingface.attaching.step import OnRetrieved, Step, TextState, make_history
from memorizing.huggingface.attaching.unwrapping import unwrap
from memorizing.huggingface.attaching.window_cache import find_text, list_layers
from memorizing.memory.frozen import FrozenMemory
from memorizing.memory.history import History, RetrievalControl
from memorizing.settings import require

_ATTRIBUTE = "memorizing"
"""Of a model with memory: its `Attachment`."""
_BINDINGS = itertools.count(1)
"""Tells memories that are opened one after another apart."""


class Attachment:
    """What `add_memory` put on a model: hooks, memory layers, and what it must restore.

    Between calls, `bind` and `unbind` say what memory layers read: what a `MemorySession` has open,
    or nothing.

    Attributes:
        settings: of the memory; the capacity may be replaced for texts that begin from then on.
        layers: the modules with gates, by layer.
        is_reading: memory layers retrieve.
        control: retrieval that is wrong on purpose, for a while.
        on_retrieved: told of what is retrieved.
    """

    def __init__(self, model: Any, decoder: Decoder, settings: MemorySettings) -> None:
        """Put memory layers and hooks on a model. In place.

        Raises:
            ConfigError: a setting that cannot work with this model; nothing is changed.
        """
        self._model, self.decoder, self.settings = model, decoder, settings
        self.control: RetrievalControl | None = None
        self.is_reading = True
        self.on_retrieved: OnRetrieved | None = None
        self._binding: int | None = None
        self._base: Mapping[int, FrozenMemory] = {}
        self._open_heads: Mapping[int, OpenHeads] = {}
        self._collected: dict[int, tuple[Tensor, Tensor]] | None = None
        self._windows = Windows(decoder, settings)
        self._changes = ModelChanges(model, decoder, settings.segment_len)
        self.layers: dict[int, MemoryLayer] = {}
        for layer in settings.layers:
            attention = decoder.attentions[layer]
            memory = MemoryLayer(decoder, layer, settings)
            memory.to(next(attention.parameters()).device)
            attention.add_module("memory", memory)
            self.layers[layer] = memory
        self._changes.leave_memory_unsaved()
        base = decoder.base
        self._handles = [
            base.register_forward_pre_hook(self._enter, with_kwargs=True),
            base.register_forward_hook(self._leave, with_kwargs=True, always_call=True),
        ]

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
        self._changes.revert()
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
        return self.__dict__ | {"on_retrieved": None}

    def model(self) -> Any:
        """The model that has this memory."""
        return self._model

    def make_cache(self) -> DynamicCache:
        """An empty cache for a text of its own."""
        return self._windows.make_cache()

    def pass_cache(self, cache: DynamicCache) -> dict[str, Any]:
        """The arguments by which the model takes a cache, in this release of `transformers`."""
        return self._windows.pass_cache(cache)

    @property
    def stored_dtype(self) -> torch.dtype:
        """Of entries while a text is read."""
        return choose_dtype(self.settings.dtype)

    @property
    def entry_shape(self) -> tuple[int, int]:
        """Heads and length of the keys of all memory layers."""
        layer = self.settings.layers[0]
        return self.decoder.count_heads(layer)[1], self.decoder.count_head_dim(layer)

    @property
    def devices(self) -> dict[int, torch.device]:
        """Where each memory layer computes."""
        return {number: layer.bias.device for number, layer in self.layers.items()}

    @property
    def is_bound(self) -> bool:
        """Whether a memory is open."""
        return self._binding is not None

    @property
    def open_heads(self) -> Mapping[int, OpenHeads]:
        """Per memory layer, the heads that read: those whose gates were open at `bind`.

        Where no memory is open, by the gates as they are now.
        """
        if self.is_bound:
            return self._open_heads
        return {number: layer.plan_open_heads() for number, layer in self.layers.items()}

    def bind(
        self,
        base: Mapping[int, FrozenMemory],
        open_heads: Mapping[int, OpenHeads] | None = None,
    ) -> None:
        """From now on, calls read this and what they remember of their own texts. In place.

        Args:
            base: per layer, what was read before, of the `key_heads` of `open_heads`.
            open_heads: those that `base` was opened for; None asks for them now.

        Raises:
            StateError: `base` has other heads.
        """
        heads = self.open_heads if open_heads is None else open_heads
        for layer, memory in base.items():
            if memory.num_heads != len(heads[layer].key_heads):
                raise StateError(
                    f"what was read has {memory.num_heads} heads of keys in layer {layer}, and "
                    f"heads {list(heads[layer].key_heads)} are read; open it for these"
                )
        self._open_heads = heads
        self._binding, self._base = self._binding or next(_BINDINGS), base

    def check_unbound(self) -> None:
        """Refuse to change gates while a memory is open.

        Raises:
            StateError: one is.
        """
        if self.is_bound:
            raise StateError(
                "a memory is open, and which heads read it was settled when it was opened; leave "
                "its with block before loading gates"
            )

    def unbind(self) -> None:
        """From now on, calls read and remember nothing. In place."""
        self._binding, self._base, self.on_retrieved = None, {}, None
        self._open_heads = {}

    @contextmanager
    def collect(self) -> Iterator[dict[int, tuple[Tensor, Tensor]]]:
        """Calls inside only read: they give their entries by layer, and end by `EntriesRead`."""
        self._collected = {}
        try:
            yield self._collected
        finally:
            self._collected = None

    def commit(self, cache: Cache) -> None:
        """See `MemorySession.commit`."""
        find_text(cache).history = self.find_history(cache).commit()
        for layer in list_layers(cache):
            layer.detach()

    def find_history(self, cache: Cache) -> History:
        """The history of a text that was read through a cache.

        Raises:
            StateError: the cache has none.
        """
        text = find_text(cache)
        if text.history is None or text.binding != self._binding:
            raise StateError(
                "this cache has no memory: it was made by another model, or read while no memory "
                "was open; make one with memory.new_cache() inside of open_memory(...)"
            )
        return text.history

    def start_text(self, cache: Cache | None, num_rows: int) -> TextState:
        """Texts with a history of nothing, which belong to the cache from now on."""
        text = TextState() if cache is None else find_text(cache)
        text.open_heads, text.binding = self.open_heads, self._binding
        text.has_ended, text.is_broken = None, False
        text.history = make_history(
            self.settings,
            num_rows,
            text.open_heads,
            self.entry_shape[1],
            self.stored_dtype,
            self.devices,
            without=None if self._collected is None else max(self.settings.layers),
        )
        return text

    def fingerprint(self) -> Fingerprint:
        """Of what stored entries depend on, as the weights are now: a pass over them."""
        return compute_fingerprint(self.decoder, self.settings)

    def dump_heads(self) -> dict[str, dict[str, list[float]]]:
        """Gates and scales of the memory layers, for JSON."""
        return {
            str(number): {name: tensor.tolist() for name, tensor in layer.state_dict().items()}
            for number, layer in self.layers.items()
        }

    def load_heads(self, heads: Mapping[str, Mapping[str, Sequence[float]]]) -> None:
        """Take over what `dump_heads` gave. In place.

        Raises:
            ConfigError: of other layers or numbers of heads.
            StateError: a memory is open.
        """
        self.check_unbound()
        for number, layer in self.layers.items():
            given = heads.get(str(number), {})
            tensors = {name: torch.tensor(values) for name, values in given.items()}
            mine = {name: tensor.shape for name, tensor in layer.state_dict().items()}
            require(
                {name: tensor.shape for name, tensor in tensors.items()} == mine,
                f"gates of layer {number}",
                sorted(given),
                f"{sorted(mine)}, a number per head",
            )
            layer.load_state_dict(tensors)

    def _enter(self, module: Any, args: Any, kwargs: Any) -> Any:
        """Hook before the base model."""
        needs_step = self.is_bound or self._collected is not None
        kwargs = self._windows.name_arguments(args, kwargs)
        given = self._windows.enter(kwargs, needs_tokens=needs_step)
        if given is not None and needs_step:
            kwargs[STEP] = self._make_step(kwargs, given)
        return (), kwargs

    def _make_step(self, kwargs: dict[str, Any], given: CallInputs) -> Step:
        entered = self._windows.find_cache(kwargs)
        cache = None if entered is None else entered.owner
        if given.start == 0 or cache is None:
            text = self.start_text(cache, given.num_rows)
        else:
            text = find_text(cache)
            if text.history is None or text.binding != self._binding:
                raise StateError(
                    f"the cache holds {given.start} tokens that no memory knows: they were read "
                    "while it was not open; read the text anew"
                )
        check_history(text, given)
        first_column = self._windows.positions.find_first_seen(given.start)
        step = Step(
            text,
            self.settings,
            list_valid(given),
            (first_column - given.list_first_valid()).clamp(min=0),
            self._base if self._collected is None else {},
            torch.is_grad_enabled(),
            self.is_reading,
            self.control,
            self._collected,
            self.on_retrieved,
        )
        text.is_broken = True
        return step

    def _leave(self, module: Any, args: Any, kwargs: Any, output: Any) -> Any:
        """Hook after the base model, also after an error, which leaves the cache as it was."""
        step = take_step(kwargs)
        is_cut = step is not None and step.is_cut
        output = self._windows.leave(kwargs, output, is_cut=is_cut)
        if step is not None and (is_cut or output is not None):
            step.finish()
        return output


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
    `generate` works greedily and by sampling; beam search and assisted decoding are refused.
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
        segment_len: the memory's clock; by default the window.
        distance: how far before a query retrieved entries seem to stand; by default the window.
        settings: as in `MemorySettings`.

    Raises:
        ConfigError: a model, layer, head or setting that cannot work.
    """
    inner = unwrap(model)
    if find_attachment(inner) is not None:
        raise ConfigError("this model has a memory; call remove_memory(model) first")
    decoder = find_decoder(inner)
    num_layers = len(decoder.attentions)
    heads = {} if heads is None else heads
    if layers is None:
        layers = list(heads) or [num_layers * 3 // 5]
    chosen = tuple(sorted(int(layer) for layer in layers))
    check_layers(chosen, num_layers)
    check_heads(heads, chosen, int(decoder.base.config.num_attention_heads))
    parsed = MemorySettings(
        chosen,
        window=window,
        segment_len=window if segment_len is None else segment_len,
        distance=window if distance is None else distance,
        **settings,
    )
    shapes = {(decoder.count_heads(layer), decoder.count_head_dim(layer)) for layer in chosen}
    require(len(shapes) == 1, "layers", list(chosen), "layers with equally many and long heads")
    attachment = inner.__dict__[_ATTRIBUTE] = Attachment(inner, decoder, parsed)
    try:
        if inner.config.model_type not in FAMILIES:
            check_family(attachment)
        if parsed.search == "normalized":
            measure_key_norms(attachment)
        for layer, open_heads in heads.items():
            attachment.layers[layer].close_all_but(open_heads)
    except BaseException:
        attachment.remove()
        raise
    return model


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
