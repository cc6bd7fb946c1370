"""What happens around each call of a model with memory: hooks on its base model.

Before the call it gets a cache of the window, positions that it knows, and a `Step` for its memory
layers; after the call these become part of the cache. Nothing is kept in between but what the call
itself carries.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from memorizing.errors import StateError
from memorizing.huggingface.attaching.families import Decoder
from memorizing.huggingface.attaching.interface import NAMES, STEP, WINDOW, CallWindow
from memorizing.huggingface.attaching.memory_settings import MemorySettings
from memorizing.huggingface.attaching.positions import Positions
from memorizing.huggingface.attaching.step import Step, TextState
from memorizing.huggingface.attaching.window_cache import (
    NEVER,
    CallCache,
    WindowLayer,
    find_text,
    list_layers,
    make_window_cache,
    make_windows,
)

_OLD_CACHE_NAME = "past_key_values"


@dataclass(frozen=True)
class CallInputs:
    """What a call is given."""

    num_rows: int
    num_tokens: int
    start: int
    """Columns that were seen before."""
    mask: Any
    first_valid: Tensor | None
    """(B,): column of the first token of each row; None is 0."""

    @property
    def num_columns(self) -> int:
        """Seen after the call."""
        return self.start + self.num_tokens

    def list_first_valid(self) -> Tensor:
        """(B,) int64 on the CPU."""
        if self.first_valid is None:
            return torch.zeros(self.num_rows, dtype=torch.int64)
        return self.first_valid.cpu()


class Windows:
    """Keeps local attention at a window, and the cache with it."""

    def __init__(self, decoder: Decoder, settings: MemorySettings) -> None:
        """Plan for a model.

        Raises:
            ConfigError: a window that the model has no positions for.
        """
        self._decoder, self._settings = decoder, settings
        self.positions = Positions(decoder, settings)
        self._parameters = tuple(inspect.signature(decoder.base.forward).parameters)
        # It was renamed in transformers 5.24.
        self._cache_name = "cache" if "cache" in self._parameters else _OLD_CACHE_NAME

    def pass_cache(self, cache: DynamicCache) -> dict[str, Any]:
        """The arguments by which a model of this release takes a cache."""
        return {self._cache_name: cache, "use_cache": True}

    def make_cache(self) -> DynamicCache:
        """An empty cache."""
        settings = self._settings
        return make_window_cache(self._decoder.own_windows, settings.window, settings.num_sinks)

    def name_arguments(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """All arguments of a call by name."""
        named = dict(zip(self._parameters, args, strict=False)) | kwargs
        if named.get(_OLD_CACHE_NAME) is not None:
            named[self._cache_name] = named.pop(_OLD_CACHE_NAME)
        return named

    def find_cache(self, kwargs: dict[str, Any]) -> CallCache | None:
        """The cache that `enter` put among the arguments."""
        cache = kwargs.get(self._cache_name)
        return cache if isinstance(cache, CallCache) else None

    def enter(self, kwargs: dict[str, Any], *, needs_tokens: bool) -> CallInputs | None:
        """Before a call: put a cache for it among its arguments, and positions. In place.

        Args:
            kwargs: all arguments.
            needs_tokens: the call must say which tokens are padding.

        Returns:
            None where there are no tokens at all, which the model will say.

        Raises:
            StateError: what cannot be right with a window.
        """
        self._check_attention()
        inputs = kwargs.get("input_ids")
        inputs = kwargs.get("inputs_embeds") if inputs is None else inputs
        if inputs is None:
            return None
        cache = self._prepare_cache(kwargs)
        start = 0 if cache is None else int(cache.get_seq_length())
        mask = kwargs.get("attention_mask")
        first_valid = _find_first(mask, start + inputs.shape[1])
        given = CallInputs(inputs.shape[0], inputs.shape[1], start, mask, first_valid)
        if needs_tokens or given.num_columns > self._settings.window:
            _check_mask(given)
            _check_positions(kwargs.get("position_ids"), given)
        self.positions.check(start, given.num_tokens)
        if cache is not None:
            self._enter_cache(cache, kwargs, given, inputs.device)
        WINDOW.set(CallWindow(self._settings.window, self._settings.num_sinks, first_valid))
        return given

    def leave(self, kwargs: dict[str, Any], output: Any, *, is_cut: bool) -> Any:
        """After a call: what it wrote becomes part of the cache. In place.

        Returns:
            The output, with the cache that the caller knows.
        """
        WINDOW.set(None)
        cache = self.find_cache(kwargs)
        if cache is None or (output is None and not is_cut):
            return output
        cache.finish(is_cut=is_cut)
        if isinstance(output, tuple):
            return tuple(cache.owner if part is cache else part for part in output)
        if output is not None and output.get(self._cache_name) is cache:
            output[self._cache_name] = cache.owner
        return output

    def _check_attention(self) -> None:
        found = self._decoder.base.config._attn_implementation
        if found not in NAMES.values():
            raise StateError(
                f"attention runs by {found!r}, which was set after add_memory; call "
                "remove_memory(model), then model.set_attn_implementation(...), then add_memory"
            )

    def _prepare_cache(self, kwargs: dict[str, Any]) -> DynamicCache | None:
        """The cache of a call; one that is empty gets layers that keep the window only."""
        cache, base = kwargs.get(self._cache_name), self._decoder.base
        use_cache = kwargs.get("use_cache")
        use_cache = base.config.use_cache if use_cache is None else use_cache
        if cache is None:
            if not use_cache or (base.training and torch.is_grad_enabled()):
                return None
            return self.make_cache()
        if type(cache) is not DynamicCache or getattr(cache, "offloading", False):
            kind = "offloaded cache" if type(cache) is DynamicCache else type(cache).__name__
            raise StateError(
                f"the cache is a {kind}; a model with memory keeps a window of its own in a "
                "DynamicCache: leave out cache_implementation and past_key_values"
            )
        if not list_layers(cache):
            if int(cache.get_seq_length()):
                raise StateError(
                    f"the cache holds {int(cache.get_seq_length())} tokens that were read without "
                    "add_memory; read the text anew"
                )
            # A cache that was made without the model's config holds what the model would not see.
            own_windows = [getattr(layer, "sliding_window", None) for layer in cache.layers]
            own_windows += [None] * (len(self._decoder.attentions) - len(own_windows))
            make_windows(cache, own_windows, self._settings.window, self._settings.num_sinks)
        return cache

    def _enter_cache(
        self,
        cache: DynamicCache,
        kwargs: dict[str, Any],
        given: CallInputs,
        device: torch.device,
    ) -> None:
        last_first = 0 if given.first_valid is None else int(given.first_valid.max())
        layers: list[WindowLayer] = [
            layer.enter(given.first_valid, last_first) for layer in list_layers(cache)
        ]
        ids = kwargs.get("position_ids")
        if ids is None:
            ids = (torch.arange(given.num_tokens) + given.start).unsqueeze(0)
        shift = self.positions.enter(layers, given.start, ids, find_text(cache).shift)
        kwargs[self._cache_name] = CallCache(cache, layers, shift)
        if bool(shift.any()):
            moved = ids - shift.to(ids.device)
            moved = moved.clamp(min=0) if self.positions.is_learned else moved
            kwargs["position_ids"] = moved.to(device)


def _find_first(mask: Any, num_columns: int) -> Tensor | None:
    """(B,) int64: the first column of each row that is not padding; None where all are 0."""
    if not isinstance(mask, Tensor) or mask.dim() != 2 or bool(mask[:, 0].all()):
        return None
    seen = mask[:, :num_columns].bool()
    return torch.where(seen.any(1), seen.to(torch.int8).argmax(1), NEVER)


def _check_mask(given: CallInputs) -> None:
    """Refuse a mask that does not say where tokens are."""
    mask, expected = given.mask, (given.num_rows, given.num_columns)
    found = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
    if mask is not None and found != expected:
        raise StateError(
            f"attention_mask is {found}; with a memory open, or past the window, it must be "
            f"(rows, tokens seen and given) = {expected}: from it the memory knows what is padding"
        )


def _check_positions(position_ids: Tensor | None, given: CallInputs) -> None:
    """Refuse several texts in one row."""
    if position_ids is None or given.mask is not None or given.num_tokens < 2:
        return  # a row with a mask has positions of its own for padding
    if not bool((position_ids.diff(dim=-1) == 1).all()):
        raise StateError(
            "position_ids do not count on from token to token, as where several texts are packed "
            "into a row; give every text a row of its own"
        )


def list_valid(given: CallInputs) -> Tensor:
    """(B, T) bool on the CPU: tokens of a call that are not padding."""
    if given.mask is None:
        return torch.ones(given.num_rows, given.num_tokens, dtype=torch.bool)
    return given.mask[:, -given.num_tokens :].bool().cpu()


def check_history(text: TextState, given: CallInputs) -> None:
    """Refuse a history that a call cannot go on with.

    Raises:
        StateError: with what to do.
    """
    if text.is_broken:
        raise StateError(
            "an earlier call on this cache was interrupted, so that its memory may hold a part of "
            "it; read the text anew with a new cache"
        )
    if text.history is not None and text.history.num_rows != given.num_rows:
        raise StateError(
            f"the call has {given.num_rows} rows and its memory {text.history.num_rows}; use a "
            "cache per batch"
        )


def take_step(kwargs: dict[str, Any]) -> Step | None:
    """The step among the arguments of a call."""
    step = kwargs.get(STEP)
    return step if isinstance(step, Step) else None
