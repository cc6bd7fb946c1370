"""Giving a model of `transformers` a memory, and taking it away again."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.cache_utils import Cache

from memorizing.errors import ConfigError, StateError
from memorizing.huggingface.families import (
    Decoder,
    check_layers,
    choose_dtype,
    count_head_dim,
    count_heads,
    find_decoder,
)
from memorizing.huggingface.fingerprint import compute_fingerprint
from memorizing.huggingface.interface import WINDOW, CallWindow, name_implementation
from memorizing.huggingface.memory_layer import MemoryLayer
from memorizing.huggingface.memory_settings import MemorySettings
from memorizing.huggingface.step import History, OnRetrieved, Step, check_valid, make_history
from memorizing.huggingface.window_cache import (
    NEVER,
    Positions,
    WindowLayer,
    list_layers,
    list_positions,
    make_window_cache,
    shorten,
)
from memorizing.memory.frozen import FrozenMemory
from memorizing.model import RetrievalControl
from memorizing.settings import require

_ATTRIBUTE = "memorizing"
"""Of a model with memory: its `Attachment`."""


class Attachment:
    """What `add_memory` put on a model: hooks, memory layers, and what it must restore.

    Between calls, `base` and `is_bound` say what memory layers read: nothing, or what a
    `MemorySession` bound.
    """

    def __init__(self, model: Any, decoder: Decoder, settings: MemorySettings) -> None:
        """Put memory layers and hooks on a model. In place."""
        self.model = weakref.ref(model)
        self.decoder = decoder
        self.settings = settings
        self.positions = Positions(
            decoder, settings.window, settings.segment_len, settings.num_sinks
        )
        self.is_bound = False
        self.control: RetrievalControl | None = None
        self.is_reading = True
        self.on_retrieved: OnRetrieved | None = None
        self._base: dict[int, FrozenMemory] = {}
        self._collected: dict[int, tuple[Tensor, Tensor]] | None = None
        self._histories: weakref.WeakKeyDictionary[Cache, History] = weakref.WeakKeyDictionary()
        self._shifts: weakref.WeakKeyDictionary[Cache, Tensor] = weakref.WeakKeyDictionary()
        self.layers: dict[int, MemoryLayer] = {}
        self._step: Step | None = None
        self._token: Any = None
        self._fingerprint: tuple[int, str] | None = None
        self._underneath = str(model.config._attn_implementation)
        config = decoder.base.config
        implementation = name_implementation(self._underneath)
        for layer in settings.layers:
            attention = decoder.attentions[layer]
            memory = MemoryLayer(decoder, layer, settings, *count_heads(attention, config))
            parameter = next(attention.parameters())
            memory.to(parameter.device)
            attention.add_module("memory", memory)
            self.layers[layer] = memory
        base = decoder.base
        self._handles = [
            base.register_forward_pre_hook(self._begin, with_kwargs=True),
            base.register_forward_hook(self._end, always_call=True),
            *(
                decoder.attentions[layer].register_forward_pre_hook(
                    memory.take_rotation, with_kwargs=True
                )
                for layer, memory in self.layers.items()
            ),
        ]
        model.set_attn_implementation(implementation)
        self._generation_config = getattr(model, "generation_config", None)
        self._chunk_size = getattr(self._generation_config, "prefill_chunk_size", None)
        if self._generation_config is not None:
            self._generation_config.prefill_chunk_size = settings.segment_len

    def remove(self) -> None:
        """Restore the model. In place."""
        model = self.model()
        for handle in self._handles:
            handle.remove()
        for layer in self.layers:
            del self.decoder.attentions[layer]._modules["memory"]
        if model is not None:
            model.set_attn_implementation(self._underneath)
            if self._generation_config is not None:
                self._generation_config.prefill_chunk_size = self._chunk_size
            del model.__dict__[_ATTRIBUTE]

    def make_cache(self) -> DynamicCache:
        """An empty cache for a text of its own."""
        return make_window_cache(self.decoder, self.settings.window, self.settings.num_sinks)

    @property
    def stored_dtype(self) -> torch.dtype:
        """Of entries while a text is read."""
        return choose_dtype(self.settings.dtype)

    def bind(self, base: dict[int, FrozenMemory]) -> None:
        """From now on, calls read this and what they remember of their own texts. In place."""
        self.is_bound, self._base = True, base

    def unbind(self) -> None:
        """From now on, calls read and remember nothing. In place."""
        self.is_bound, self._base, self.on_retrieved = False, {}, None
        self._histories.clear()

    @contextmanager
    def collect(self) -> Iterator[dict[int, tuple[Tensor, Tensor]]]:
        """Calls inside only read: they give their entries by layer, and end by `EntriesRead`."""
        self._collected = {}
        try:
            yield self._collected
        finally:
            self._collected = None

    def finish_early(self) -> None:
        """Count a call that ended by `EntriesRead`."""
        assert self._step is not None
        self._step.finish()

    def commit(self, cache: Cache) -> None:
        """See `MemorySession.commit`."""
        self.find_history(cache).commit()
        for layer in list_layers(cache):
            layer.detach()

    def find_history(self, cache: Cache) -> History:
        """The history of a text that was read through a cache.

        Raises:
            StateError: the cache has none.
        """
        history = self._histories.get(cache)
        if history is None:
            raise StateError(
                "this cache has no memory: it was made by another model, or read while no memory "
                "was open; make one with memory.new_cache() inside of open_memory(...)"
            )
        return history

    def fingerprint(self) -> str:
        """Of what stored entries depend on. Kept until a weight changes."""
        versions = sum(weight._version for weight in self.decoder.base.parameters())
        if self._fingerprint is None or self._fingerprint[0] != versions:
            self._fingerprint = (versions, compute_fingerprint(self.decoder, self.settings))
        return self._fingerprint[1]

    def dump_heads(self) -> dict[str, dict[str, list[float]]]:
        """Gates and scales of the memory layers, for JSON."""
        return {
            str(number): {name: tensor.tolist() for name, tensor in layer.state_dict().items()}
            for number, layer in self.layers.items()
        }

    def load_heads(self, heads: dict[str, dict[str, list[float]]]) -> None:
        """Take over what `dump_heads` gave. In place.

        Raises:
            ConfigError: of other layers or numbers of heads.
        """
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

    def _make_history(self, num_rows: int, device: torch.device) -> History:
        attention = self.decoder.attentions[self.settings.layers[0]]
        config = self.decoder.base.config
        return make_history(
            self.settings,
            num_rows,
            count_heads(attention, config)[1],
            count_head_dim(attention, config),
            self.stored_dtype,
            device,
            without=None if self._collected is None else max(self.settings.layers),
        )

    def _begin(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        """Hook before the base model: the cache, positions, and the step."""
        inputs = kwargs.get("input_ids", args[0] if args else None)
        inputs = kwargs.get("inputs_embeds") if inputs is None else inputs
        if inputs is None:
            return None  # the model says what is missing
        num_rows, num_tokens = inputs.shape[:2]
        cache = self._prepare_cache(kwargs)
        start = 0 if cache is None else int(cache.get_seq_length())
        mask = kwargs.get("attention_mask")
        first_valid = _find_first(mask, start + num_tokens)
        self.positions.check(start, num_tokens)
        if cache is not None:
            self._place(cache, kwargs, num_tokens, start, first_valid, inputs.device)
        self._step = None
        if self.is_bound or self._collected is not None:
            self._step = self._make_step(cache, mask, num_rows, num_tokens, start, inputs.device)
        for layer in self.layers.values():
            layer.step = self._step
        view = CallWindow(self.settings.window, self.settings.num_sinks, first_valid)
        self._token = WINDOW.set(view)
        return args, kwargs

    def _place(
        self,
        cache: DynamicCache,
        kwargs: dict[str, Any],
        num_tokens: int,
        start: int,
        first_valid: Tensor | None,
        device: torch.device,
    ) -> None:
        """Tell the cache where texts begin, and the model where the call's tokens stand."""
        for layer in list_layers(cache):
            layer.first_valid = first_valid
        ids = list_positions(kwargs, num_tokens, start)
        shift = self._shifts.get(cache, torch.zeros(1, 1, dtype=torch.int64)).to(ids.device)
        shift = self._shifts[cache] = self.positions.move(cache, start, ids, shift)
        if bool(shift.any()):
            moved = ids - shift
            kwargs["position_ids"] = (
                moved.clamp(min=0) if self.positions.is_learned else moved
            ).to(device)

    def _prepare_cache(self, kwargs: dict[str, Any]) -> DynamicCache | None:
        """The cache of a call, with layers that keep the window only."""
        cache = kwargs.get("past_key_values")
        use_cache = kwargs.get("use_cache")
        use_cache = self.decoder.base.config.use_cache if use_cache is None else use_cache
        if cache is None:
            if not use_cache or (self.decoder.base.training and torch.is_grad_enabled()):
                return None
            cache = self.make_cache()
            kwargs["past_key_values"] = cache
            return cache
        if type(cache) is not DynamicCache:
            raise StateError(
                f"the cache is a {type(cache).__name__}; a model with memory keeps a window of its "
                "own in a DynamicCache: leave out cache_implementation and past_key_values"
            )
        if not cache.layers or not isinstance(cache.layers[0], WindowLayer):
            if int(cache.get_seq_length()):
                raise StateError(
                    f"the cache holds {int(cache.get_seq_length())} tokens that were read without "
                    "add_memory; read the text anew"
                )
            shorten(cache, self.decoder, self.settings.window, self.settings.num_sinks)
        return cache

    def _make_step(
        self,
        cache: DynamicCache | None,
        mask: Tensor | None,
        num_rows: int,
        num_tokens: int,
        start: int,
        device: torch.device,
    ) -> Step:
        if mask is not None and mask.dim() != 2:
            raise StateError(
                f"attention_mask is {tuple(mask.shape)}; with a memory open it must be (rows, "
                "tokens), from which the memory knows what is padding"
            )
        valid = torch.ones(num_rows, num_tokens, dtype=torch.bool)
        if mask is not None:
            valid = mask[:, -num_tokens:].bool().cpu()
        check_valid(valid)
        history = None if cache is None else self._histories.get(cache)
        if history is None:
            if start:
                raise StateError(
                    f"the cache holds {start} tokens that no memory knows: they were read while no "
                    "memory was open; read the text anew"
                )
            history = self._make_history(num_rows, device)
            if cache is not None:
                self._histories[cache] = history
        if history.is_broken or history.num_seen != start:
            raise StateError(
                "an earlier call on this cache was interrupted, so that cache and memory differ; "
                "read the text anew with a new cache"
            )
        if len(history.position) != num_rows:
            raise StateError(
                f"the call has {num_rows} rows and its memory {len(history.position)}; use a cache "
                "per batch"
            )
        step = Step(
            history,
            valid,
            {} if self._collected is not None else self._base,
            torch.is_grad_enabled(),
            self.is_reading,
            self.control,
            collected=self._collected,
            on_retrieved=self.on_retrieved,
        )
        step.check()
        history.is_broken = True
        return step

    def _end(self, module: nn.Module, args: Any, output: Any) -> None:
        """Hook after the base model, also after an error: what the call's layers staged counts."""
        if self._token is not None:
            WINDOW.reset(self._token)
            self._token = None
        step = self._step
        if step is not None and output is not None:
            step.finish()


def _find_first(mask: Tensor | None, num_columns: int) -> Tensor | None:
    """(B,) int64: the first column of each row that is not padding; None where all are 0."""
    if mask is None or mask.dim() != 2 or bool(mask[:, 0].all()):
        return None
    seen = mask[:, :num_columns].bool()
    return torch.where(seen.any(1), seen.to(torch.int8).argmax(1), NEVER)


def add_memory(
    model: Any,
    layers: Sequence[int] | None = None,
    *,
    window: int = 512,
    segment_len: int | None = None,
    **settings: Any,
) -> Any:
    """Give a causal language model of `transformers` a memory. In place; returns the model.

    Nothing is stored yet, and the logits of texts within the window are exactly those of before:
    see `open_memory`. The model's own weights are not changed, and `remove_memory` restores it.

    Args:
        model: of a family in `FAMILIES`, or one that is laid out alike.
        layers: which layers read a memory, counted from 0; None takes the one at three quarters.
        window: tokens that local attention sees, and the cache keeps.
        segment_len: the memory's clock; by default the window.
        settings: as in `MemorySettings`.

    Raises:
        ConfigError: a model, layer or setting that cannot work.
    """
    if _ATTRIBUTE in model.__dict__:
        raise ConfigError("this model has a memory; call remove_memory(model) first")
    decoder = find_decoder(model)
    num_layers = len(decoder.attentions)
    chosen = (num_layers * 3 // 4,) if layers is None else tuple(int(layer) for layer in layers)
    check_layers(chosen, num_layers)
    parsed = MemorySettings(
        tuple(sorted(chosen)),
        window=window,
        segment_len=window if segment_len is None else segment_len,
        **settings,
    )
    require(
        window <= decoder.max_positions,
        "window",
        window,
        f"at most {decoder.max_positions}, the positions this model has",
    )
    attachment = Attachment(model, decoder, parsed)
    model.__dict__[_ATTRIBUTE] = attachment
    return model


def remove_memory(model: Any) -> Any:
    """Take away what `add_memory` gave: the model is as before. In place; returns the model.

    Raises:
        ConfigError: the model has no memory.
    """
    get_attachment(model).remove()
    return model


def get_attachment(model: Any) -> Attachment:
    """What `add_memory` put on a model.

    Raises:
        ConfigError: the model has no memory.
    """
    attachment = model.__dict__.get(_ATTRIBUTE)
    if attachment is None:
        raise ConfigError(
            f"this {type(model).__name__} has no memory; call memorizing.add_memory(model) first"
        )
    return attachment
