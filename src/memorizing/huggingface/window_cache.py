"""A cache of the last tokens, and of the first few, with positions that the model was trained on.

Shapes: B rows, H heads of keys, S keys, T tokens of a call, D head_dim.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import Cache, DynamicSlidingWindowLayer

from memorizing.errors import StateError
from memorizing.huggingface.families import Decoder, rotate_back

NEVER = 2**40
"""First column of a row that has only padding so far."""


class WindowLayer(DynamicSlidingWindowLayer):
    """Keeps the window - 1 tokens that the next one sees, and the first `num_sinks` of the text.

    A pre-trained model puts much of its attention on the first tokens of a text, whatever they are,
    and loses its language without them (Xiao et al. 2023, "attention sinks"): so they stay. Once
    they have left the window they stand in front of the other keys.

    Only what `transformers` asks of a cache layer is replaced here.
    """

    def __init__(self, sliding_window: int, num_sinks: int, *, is_sliding: bool) -> None:
        """Take the tokens that are seen, and whether the layer has such a window by itself.

        `transformers` sizes the masks of all layers with a window by the first of them, and those
        of the others by the first of the others.
        """
        super().__init__(sliding_window)
        self.is_sliding = is_sliding
        self.num_sinks = num_sinks
        self.first_valid: Tensor | None = None
        """(B,): column of the first token of each row; None is 0. Set before each call."""
        self.sink_keys: Tensor | None = None
        self.sink_values: Tensor | None = None

    def count_held(self) -> int:
        """Tokens in the cache, without sinks."""
        return self.keys.shape[-2] if self.keys is not None and self.keys.dim() == 4 else 0

    def get_held(self) -> tuple[Tensor, Tensor]:
        """Keys and values of the tokens in the cache, without sinks."""
        assert self.keys is not None
        assert self.values is not None
        return self.keys, self.values

    def count_dropped(self) -> int:
        """Columns that were seen and are held no more, but for sinks."""
        return self.cumulative_length - self.count_held()

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Keys that a call of `query_length` tokens sees, sinks included, and the first column."""
        held, dropped = self.count_held(), self.count_dropped()
        return held + query_length + (self.num_sinks if dropped else 0), dropped

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Take in (B, H, T, D) and return what the call sees: sinks, held, new."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        dropped = self.count_dropped()
        held_keys, held_values = self.get_held()
        keys = torch.cat([held_keys, key_states], dim=-2)
        values = torch.cat([held_values, value_states], dim=-2)
        seen = (keys, values)
        if dropped and self.num_sinks:
            assert self.sink_keys is not None
            assert self.sink_values is not None
            seen = (
                torch.cat([self.sink_keys, keys], -2),
                torch.cat([self.sink_values, values], -2),
            )
        self.cumulative_length += key_states.shape[-2]
        excess = max(0, keys.shape[-2] - self.sliding_window + 1)
        self._drop(keys, values, dropped, excess)
        return seen

    def clear(self) -> None:
        """Hold nothing but sinks from now on."""
        if self.count_held():
            self._drop(*self.get_held(), self.count_dropped(), self.count_held())

    def _drop(self, keys: Tensor, values: Tensor, first: int, count: int) -> None:
        """Keep keys and values but for their first `count` columns, which begin at `first`."""
        if count and self.num_sinks:
            if self.sink_keys is None or self.sink_values is None:
                self.sink_keys = torch.zeros_like(keys[:, :, :1]).repeat(1, 1, self.num_sinks, 1)
                self.sink_values = torch.zeros_like(self.sink_keys)
            places = self._place_sinks(keys) - first
            is_leaving = ((places >= 0) & (places < count))[:, None, :, None]
            where = places.clamp(0, count - 1)[:, None, :, None]
            where = where.expand(-1, keys.shape[1], -1, keys.shape[3])
            self.sink_keys = torch.where(is_leaving, keys.gather(2, where), self.sink_keys)
            self.sink_values = torch.where(is_leaving, values.gather(2, where), self.sink_values)
        # A view would keep everything in memory.
        self.keys = keys[:, :, count:].clone() if count else keys
        self.values = values[:, :, count:].clone() if count else values

    def _place_sinks(self, keys: Tensor) -> Tensor:
        """(B, num_sinks) int64: columns of the first tokens of each row."""
        offsets = torch.arange(self.num_sinks, device=keys.device)
        if self.first_valid is None:
            return offsets.expand(keys.shape[0], -1)
        return self.first_valid.to(keys.device).unsqueeze(1) + offsets

    def detach(self) -> None:
        """Cut the cache off from the graph of the call that wrote it."""
        if self.is_initialized:
            keys, values = self.get_held()
            self.keys, self.values = keys.detach(), values.detach()
        if self.sink_keys is not None and self.sink_values is not None:
            self.sink_keys, self.sink_values = self.sink_keys.detach(), self.sink_values.detach()

    def activate_past_recording(self) -> None:
        """Refused: see `crop`."""
        self.crop(0)

    def crop(self, tokens_to_remove: int) -> None:
        """Refused: what was read is in memory, and cannot be taken back.

        Raises:
            StateError: always.
        """
        raise StateError(
            "assisted and speculative decoding reject tokens that a memory has taken in already; "
            "call generate() without an assistant model, prompt lookup or DoLa"
        )

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Refused: a memory belongs to its row.

        Raises:
            StateError: always.
        """
        raise StateError(
            "beam search exchanges rows, and their memories would not follow; call generate() "
            "with num_beams=1"
        )


def make_window_cache(decoder: Decoder, window: int, num_sinks: int) -> DynamicCache:
    """An empty cache of the model; layers with a shorter window of their own are as they were."""
    cache = DynamicCache(config=decoder.base.config)
    shorten(cache, decoder, window, num_sinks)
    return cache


def shorten(cache: DynamicCache, decoder: Decoder, window: int, num_sinks: int) -> None:
    """Give an empty cache layers of at most `window` tokens. In place."""
    own = [getattr(layer, "sliding_window", None) for layer in cache.layers]
    own += [None] * (len(decoder.attentions) - len(own))
    cache.layers = []
    for length in own:
        if length is not None and length <= window:
            cache.layers.append(WindowLayer(length, 0, is_sliding=True))
        else:
            cache.layers.append(WindowLayer(window, num_sinks, is_sliding=length is not None))
    cache.layer_class_to_replicate = None


def list_layers(cache: Cache) -> list[WindowLayer]:
    """The layers of a cache of ours."""
    return [layer for layer in cache.layers if isinstance(layer, WindowLayer)]


class Positions:
    """Keeps positions below the model's limit, whatever the length of the text.

    Rotary positions matter by their differences only: a zone's first tokens find the cached keys
    moved back, all by as much, and go on behind them; sinks keep their place. Learned positions
    cannot be moved: there a new zone starts at position 0 with a cache of nothing but sinks, so
    that its first tokens see little local context. Zones begin at multiples of the segment, so that
    a text has the same positions however its calls are cut.
    """

    def __init__(self, decoder: Decoder, window: int, segment_len: int, num_sinks: int) -> None:
        """Plan zones for a model."""
        self._decoder = decoder
        limit = decoder.max_positions // segment_len * segment_len
        self.is_learned = decoder.family.positions == "learned"
        overlap = 0 if self.is_learned else -(-window // segment_len) * segment_len
        if limit <= overlap:  # positions of one window only: a zone per segment
            limit, overlap = decoder.max_positions, max(0, decoder.max_positions - segment_len)
        self.limit, self._overlap = limit, overlap
        self._zone_len = limit - overlap

    def find_zone(self, column: int) -> int:
        """The zone of a column of the cache, from 0."""
        return max(0, (column - self._overlap) // self._zone_len)

    def check(self, start: int, num_tokens: int) -> None:
        """Refuse a call over the end of a zone.

        Raises:
            StateError: with the most tokens that may follow.
        """
        zone = self.find_zone(start)
        if zone != self.find_zone(start + num_tokens - 1):
            most = self._overlap + (zone + 1) * self._zone_len - start
            raise StateError(
                f"a call reads {num_tokens} tokens at once, and here the model has positions for "
                f"{most} more; read in pieces of segment_len (generate() does, with the "
                "prefill_chunk_size that add_memory sets)"
            )

    def move(self, cache: DynamicCache, start: int, position_ids: Tensor, shift: Tensor) -> Tensor:
        """How far positions are moved back from column `start` on; cached keys move in place.

        Args:
            cache: of the text.
            start: columns seen so far.
            position_ids: (B or 1, T) of the call, not moved.
            shift: (B or 1, 1) int64 so far.
        """
        is_entering = start > 0 and self.find_zone(start) != self.find_zone(start - 1)
        if not is_entering:
            return shift
        if self.is_learned:
            for layer in list_layers(cache):
                layer.clear()
            return position_ids[:, :1].clone()
        for index, layer in enumerate(list_layers(cache)):
            if self._decoder.is_rotated(index) and layer.count_held():
                attention = self._decoder.attentions[index]
                distance = torch.tensor([self._zone_len])
                keys, _ = layer.get_held()
                rotation = self._decoder.look_up_rotation(index, distance, keys)
                layer.keys = rotate_back(attention, keys, rotation, keep_norm=True)
        return shift + self._zone_len


def list_positions(kwargs: dict[str, Any], num_tokens: int, start: int) -> Tensor:
    """Position ids of a call, given or what `transformers` would take."""
    given = kwargs.get("position_ids")
    return (torch.arange(num_tokens) + start).unsqueeze(0) if given is None else given
