"""What happens around each call of a model with memory: hooks on its base model.

Before the call it gets a cache of the window, positions that it knows, and a `Step` for its memory
layers; after the call these become part of the cache. Nothing is kept in between but what the call
itself carries, and nothing about one call is a field of the model: several threads may call it.
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import Cache

from memorizing.errors import StateError
from memorizing.huggingface.attaching.call_inputs import CallInputs
from memorizing.huggingface.attaching.decoder import Decoder
from memorizing.huggingface.attaching.interface import NAMES, STEP, WINDOW, CallWindow
from memorizing.huggingface.attaching.memory_layer import MemoryLayer, OpenHeads
from memorizing.huggingface.attaching.memory_settings import MemorySettings
from memorizing.huggingface.attaching.passage_room import Library
from memorizing.huggingface.attaching.step import (
    CallMode,
    Collector,
    EntriesRead,
    OnRetrieved,
    OpenMemory,
    Step,
)
from memorizing.huggingface.attaching.window_cache import (
    CallCache,
    Positions,
    TextState,
    WindowLayer,
    find_first_valid,
    find_text,
    list_layers,
    make_windows,
)
from memorizing.huggingface.releases import CACHE_NAME, take_cache
from memorizing.index_settings import parse_index
from memorizing.memory import History, Memory
from memorizing.memory.frozen import SearchedMemory

_NUMBERS = itertools.count(1)
"""Of memories that are opened one after another."""


class Calls:
    """The calls of one model with memory.

    Between calls, `bind` and `unbind` say what memory layers read: what a `MemorySession` has open,
    or nothing. `change_mode` and `listen` say otherwise for the thread, or task, that runs inside.

    Attributes:
        decoder: the model, seen by its attention layers.
        settings: of the memory; the capacity may be replaced for texts that begin from then on.
        layers: the modules with gates, by layer.
    """

    def __init__(self, decoder: Decoder, settings: MemorySettings) -> None:
        """Plan for a model.

        Raises:
            ConfigError: a window that the model has no positions for.
        """
        self.decoder, self.settings = decoder, settings
        self.layers: dict[int, MemoryLayer] = {}
        self._open_for_all: OpenMemory | None = None
        self._positions = Positions(decoder, settings)
        self._parameters = tuple(inspect.signature(decoder.base.forward).parameters)

    @property
    def mode(self) -> CallMode:
        """How calls are made here and now."""
        return _MODES.get().get(self, _PLAIN)

    def _set_mode(self, mode: CallMode) -> None:
        modes = {calls: other for calls, other in _MODES.get().items() if calls is not self}
        _MODES.set(modes if mode == _PLAIN else {**modes, self: mode})

    @contextmanager
    def change_mode(self, **changes: Any) -> Iterator[None]:
        """Make the calls of this thread, or task, otherwise inside; see `CallMode`.

        A thread that is started inside does not inherit it, unless it runs in a copy of the
        context, as `asyncio.to_thread` does.
        """
        before = self.mode
        self._set_mode(replace(before, **changes))
        try:
            yield
        finally:
            self._set_mode(replace(self.mode, **{name: getattr(before, name) for name in changes}))

    @contextmanager
    def listen(self, listener: OnRetrieved) -> Iterator[None]:
        """Tell of what calls of this thread, or task, retrieve inside; see `change_mode`."""
        self._set_mode(replace(self.mode, listeners=(*self.mode.listeners, listener)))
        try:
            yield
        finally:
            # Others may have come and gone since, in any order.
            left = tuple(other for other in self.mode.listeners if other is not listener)
            self._set_mode(replace(self.mode, listeners=left))

    @contextmanager
    def collect(self) -> Iterator[dict[int, tuple[Tensor, Tensor]]]:
        """One call inside only reads: gives its entries by layer, and ends with the last of them.

        What comes after the call in the `with` block is not run. No gradient is kept.
        """
        collector = Collector(self.decoder, self.kept_layers)
        with self._make_apart(collected=collector), suppress(EntriesRead):
            yield collector.entries

    @contextmanager
    def _make_apart(self, **changes: Any) -> Iterator[None]:
        """Make calls inside another one, or in its place, that keep no graph; see `CallMode`."""
        # What is made in inference mode could not be used with gradients outside of it.
        with torch.inference_mode(False), torch.no_grad(), self.change_mode(**changes):
            yield

    @property
    def opened(self) -> OpenMemory | None:
        """What calls here and now read besides their own texts, where a memory is open."""
        return self.mode.opened or self._open_for_all

    @property
    def is_bound(self) -> bool:
        """Whether a memory is open."""
        return self.opened is not None

    @property
    def open_heads(self) -> Mapping[int, OpenHeads]:
        """Per memory layer, the heads that read: those whose gates were open at `bind`.

        Where no memory is open, by the gates as they are now.
        """
        if self.opened is not None:
            return self.opened.open_heads
        return {number: layer.plan_open_heads() for number, layer in self.layers.items()}

    def plan_opening(
        self, base: Mapping[int, SearchedMemory], library: Library | None = None
    ) -> OpenMemory:
        """What calls read where this is open, and what they remember of their own texts.

        Args:
            base: per layer, what was read before, of the `key_heads` of `open_heads`.
            library: the documents of `base`, where passages are read.

        Raises:
            StateError: `base` has other heads.
        """
        heads = self.open_heads
        for layer, memory in base.items():
            if memory.num_heads != len(heads[layer].key_heads):
                raise StateError(
                    f"what was read has {memory.num_heads} heads of keys in layer {layer}, and "
                    f"heads {list(heads[layer].key_heads)} are read; open it for these"
                )
        number = self.opened.number if self.opened else next(_NUMBERS)
        return OpenMemory(number, base, heads, self.devices, library)

    def bind(self, base: Mapping[int, SearchedMemory], library: Library | None = None) -> None:
        """From now on, all calls read this; see `plan_opening`. In place.

        Raises:
            StateError: `base` has other heads.
        """
        self._open_for_all = self.plan_opening(base, library)

    def unbind(self) -> None:
        """From now on, calls read and remember nothing. In place."""
        self._open_for_all = None

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
        if text.history is None or text.opened != self._number:
            raise StateError(
                f"the cache holds {int(cache.get_seq_length())} tokens that no memory knows: they "
                "were read by another model, or while this memory was not open; read the text "
                "anew, with memory.new_cache() inside of open_memory(...)"
            )
        return text.history

    @property
    def _number(self) -> int | None:
        return None if self.opened is None else self.opened.number

    @property
    def stored_dtype(self) -> torch.dtype:
        """Of entries while a text is read."""
        return getattr(torch, self.settings.dtype)

    @property
    def entry_shape(self) -> tuple[int, int]:
        """Heads and length of the keys of all memory layers."""
        return self.decoder.shapes[self.settings.layers[0]][1:]

    @property
    def kept_layers(self) -> tuple[int, ...]:
        """Layers whose entries are kept of what is read, ascending."""
        return self.settings.list_kept(self.decoder.num_cached)

    @property
    def devices(self) -> dict[int, torch.device]:
        """Where each memory layer computes."""
        return {number: layer.bias.device for number, layer in self.layers.items()}

    def start_text(self, cache: Cache | None, num_rows: int) -> TextState:
        """Texts with a history of nothing, which belong to the cache from now on."""
        settings, mode, heads = self.settings, self.mode, self.open_heads
        capacity = settings.capacity if mode.capacity is None else mode.capacity
        layers = settings.layers if capacity else ()
        index = parse_index(settings.index) if mode.index is None else mode.index
        # The last layer of a call that only reads retrieves for nothing; for passages, all do.
        last = None if mode.collected is None else max(settings.layers)
        if mode.collected is not None and settings.finds_passages:
            layers = ()
        history = History(
            segment_len=settings.segment_len,
            position=torch.zeros(num_rows, dtype=torch.int64),
            memories={
                layer: Memory(
                    num_rows,
                    len(heads[layer].key_heads),
                    capacity,
                    self.entry_shape[1],
                    self.stored_dtype,
                    self.devices[layer],
                    index,
                )
                for layer in layers
                if heads[layer].is_any and layer != last
            },
        )
        text = TextState() if cache is None else find_text(cache)
        text.history, text.open_heads, text.opened = history, heads, self._number
        text.has_ended, text.is_broken = None, False
        text.room, text.queries, text.queries_valid, text.pieces = None, {}, None, []
        return text

    def make_cache(self) -> DynamicCache:
        """An empty cache for a text of its own."""
        windows = self.decoder.own_windows[: self.decoder.num_cached]
        return make_windows(DynamicCache(), windows, self.window, self.settings.num_sinks)

    @property
    def window(self) -> int:
        """Tokens that local attention sees here and now."""
        return self.settings.window if self.mode.window is None else self.mode.window

    @property
    def max_window(self) -> int:
        """The most tokens that it could see."""
        return self._positions.limit

    def pass_cache(self, cache: DynamicCache) -> dict[str, Any]:
        """The arguments by which the model takes a cache, in this release of `transformers`."""
        return {CACHE_NAME: cache, "use_cache": True}

    @torch.compiler.disable
    def _enter(self, module: Any, args: Any, kwargs: Any) -> Any:
        """Hook before the base model: put a cache, positions and a step among its arguments.

        Raises:
            StateError: what cannot be right with a window.
        """
        if module is not self.decoder.base:
            raise StateError(
                "a copy of this model is called that shares its memory, as DataParallel makes one "
                "for every GPU; call the model itself, or use a process per GPU"
            )
        kwargs = self._name_arguments(args, kwargs)
        mode, opened = self.mode, self.opened
        if mode.is_plain:
            return (), kwargs
        needs_step = opened is not None or mode.collected is not None
        self._check_attention()
        if opened is not None and opened.devices != self.devices:
            raise StateError(
                f"the model was moved to {_list_devices(self.devices)} while a memory was open on "
                f"{_list_devices(opened.devices)}; leave its with block, and open it again"
            )
        inputs = kwargs.get("input_ids")
        inputs = kwargs.get("inputs_embeds") if inputs is None else inputs
        if inputs is None:
            return (), kwargs  # no tokens at all, which the model will say
        cache = self._prepare_cache(kwargs)
        start = 0 if cache is None else int(cache.get_seq_length())
        mask = kwargs.get("attention_mask")
        first_valid = find_first_valid(mask, start + inputs.shape[1])
        given = CallInputs(inputs.shape[0], inputs.shape[1], start, mask, first_valid)
        ids = kwargs.get("position_ids")
        num_ids = given.num_tokens if ids is None else ids.shape[-1]
        # Of embeddings generate makes pieces without tokens, up to 5.22 without position_ids, too.
        if given.num_tokens == 0 or num_ids not in (1, given.num_tokens):
            told = "" if ids is None else f" has position_ids for {num_ids}, and"
            raise StateError(
                f"a call of {given.num_tokens} tokens{told} cannot be computed; where generate "
                "makes it of inputs_embeds, which it cannot cut into pieces, give it "
                "prefill_chunk_size=None"
            )
        if needs_step or given.num_columns > self.window:
            given.check_mask()
            given.check_positions(ids)
        if needs_step and kwargs.get("output_attentions"):
            raise StateError(
                "output_attentions would give the weights of local attention alone; leave it out "
                "where a memory is open, and use memory.record() for what is retrieved"
            )
        self._positions.check(start, given.num_tokens)
        # Of the cache that the caller has: that of the call is a copy.
        step = self._make_step(cache, given, mode, opened) if needs_step else None
        if step is not None:
            step.ids = kwargs.get("input_ids")
            if cache is not None and self._reads_passages:
                self._find_passages(step, cache, given, kwargs)
        if cache is not None:
            self._enter_cache(cache, kwargs, given, inputs.device)
        view = CallWindow(self.window, self.settings.num_sinks, first_valid)
        room = None if cache is None else find_text(cache).room
        if room is not None:
            view = replace(
                view, room_first=room.first, room_len=room.length, room_before=room.before
            )
        WINDOW.set(view)
        if step is not None:
            kwargs[STEP] = step
            step.text.is_broken = True
        return (), kwargs

    @torch.compiler.disable
    def _leave(self, module: Any, args: Any, kwargs: Any, output: Any) -> Any:
        """Hook after the base model, also after an error, which leaves the cache as it was.

        Returns:
            The output, with the cache that the caller knows.
        """
        WINDOW.set(None)
        step = kwargs.get(STEP)
        is_cut = step is not None and step.is_cut
        if step is not None and step.mode.asked is not None:
            step.text.is_broken = False
            return output
        if output is None and not is_cut:
            return output
        cache = kwargs.get(CACHE_NAME)
        if isinstance(cache, CallCache):
            cache.finish(is_cut=is_cut)
            if isinstance(output, tuple):
                output = tuple(cache.owner if part is cache else part for part in output)
            elif output is not None and output.get(CACHE_NAME) is cache:
                output[CACHE_NAME] = cache.owner
        if step is not None:
            step.finish()
        return output

    def _name_arguments(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """All arguments of a call by name."""
        named = dict(zip(self._parameters, args, strict=False)) | kwargs
        given = {"cache", "past_key_values"} & named.keys()
        return named if given == {CACHE_NAME} else named | {CACHE_NAME: take_cache(named)}

    def _make_step(
        self,
        cache: DynamicCache | None,
        given: CallInputs,
        mode: CallMode,
        opened: OpenMemory | None,
    ) -> Step:
        if given.start == 0 or cache is None:
            text = self.start_text(cache, given.num_rows)
        else:
            self.find_history(cache)
            text = find_text(cache)
        text.check(given.num_rows)
        first_seen = torch.full((given.num_rows,), self._positions.find_first_seen(given.start))
        if given.first_valid is not None:
            first_seen = (first_seen - given.first_valid.cpu()).clamp(min=0)
        return Step(
            text,
            self.settings,
            given.list_valid(),
            first_seen,
            opened.base if opened is not None and mode.collected is None else {},
            mode,
            torch.is_grad_enabled(),
        )

    @property
    def _reads_passages(self) -> bool:
        """Whether calls here and now find passages, and read them."""
        mode = self.mode
        is_asked = mode.collected is not None or not mode.is_reading
        return self.settings.finds_passages and self.is_bound and not is_asked

    def _find_passages(
        self, step: Step, cache: DynamicCache, given: CallInputs, kwargs: dict[str, Any]
    ) -> None:
        """Put passages in front of the text before a call, where it is time to; see `Reader`."""

    def _check_attention(self) -> None:
        found = self.decoder.base.config._attn_implementation
        if found not in NAMES.values():
            raise StateError(
                f"attention runs by {found!r}, which was set after add_memory; call "
                "remove_memory(model), then model.set_attn_implementation(...), then add_memory"
            )

    def _prepare_cache(self, kwargs: dict[str, Any]) -> DynamicCache | None:
        """The cache of a call; one that is empty gets layers that keep the window only."""
        cache, base = kwargs.get(CACHE_NAME), self.decoder.base
        use_cache = kwargs.get("use_cache")
        use_cache = base.config.use_cache if use_cache is None else use_cache
        if cache is None:
            is_trained = base.training and torch.is_grad_enabled()
            if (not use_cache or is_trained) and not self._reads_passages:
                return None
            return self.make_cache()
        if type(cache) is not DynamicCache or getattr(cache, "offloading", False):
            kind = "DynamicCache that is offloaded"
            kind = kind if type(cache) is DynamicCache else type(cache).__name__
            raise StateError(
                f"the cache is a {kind}; a model with memory keeps a window of its own in a "
                "DynamicCache: leave out cache_implementation and past_key_values"
            )
        if not list_layers(cache):
            if int(cache.get_seq_length()):
                raise StateError(
                    f"the cache holds {int(cache.get_seq_length())} tokens that were read without "
                    "add_memory, or that prefix tuning of peft put there, which a memory cannot "
                    "be used with; read the text anew, without prefix tuning"
                )
            # A cache that was made without the model's config holds what the model would not see.
            held = cache.layers[: self.decoder.num_cached]
            own_windows = [getattr(layer, "sliding_window", None) for layer in held]
            own_windows += [None] * (self.decoder.num_cached - len(own_windows))
            make_windows(cache, own_windows, self.window, self.settings.num_sinks)
        return cache

    def _enter_cache(
        self,
        cache: DynamicCache,
        kwargs: dict[str, Any],
        given: CallInputs,
        device: torch.device,
    ) -> None:
        last_first = 0 if given.first_valid is None else int(given.first_valid.max())
        text = find_text(cache)
        rooms = [None] * len(cache.layers) if text.room is None else text.room.layers
        layers: list[WindowLayer] = [
            layer.enter(given.first_valid, last_first, held)
            for layer, held in zip(list_layers(cache), rooms, strict=True)
        ]
        ids = kwargs.get("position_ids")
        if ids is None:
            ids = (torch.arange(given.num_tokens) + given.start).unsqueeze(0)
        room_len = text.room_len
        shift = self._positions.enter(layers, given.start, ids, text.shift, room_len)
        if text.room is not None and not room_len:
            room_len = self.settings.room_len
            shift = self._positions.make_room(layers, shift, room_len)
        kwargs[CACHE_NAME] = CallCache(cache, layers, shift, room_len)
        if bool(shift.any()):
            moved = ids - shift.to(ids.device)
            moved = moved.clamp(min=0) if self._positions.is_learned else moved
            kwargs["position_ids"] = moved.to(device)


_PLAIN = CallMode()
_MODES: ContextVar[Mapping[Calls, CallMode]] = ContextVar("memorizing_modes", default={})  # noqa: B039
"""Of the thread, or task, that is running, where it is not plain."""


def _list_devices(devices: Mapping[int, torch.device]) -> str:
    return ", ".join(sorted({str(device) for device in devices.values()}))
