"""A cache of the last tokens, and of the first few; and the positions that they have in it.

Shapes: B rows, H heads of keys, S keys, T tokens of a call, D head_dim.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import Cache, DynamicSlidingWindowLayer

from memorizing.errors import StateError
from memorizing.huggingface.attaching.decoder import Decoder
from memorizing.huggingface.attaching.memory_layer import OpenHeads
from memorizing.huggingface.attaching.memory_settings import MemorySettings
from memorizing.huggingface.attaching.passage_room import Room
from memorizing.huggingface.attaching.passages import LAST
from memorizing.memory import History
from memorizing.settings import require

_NOTHING = torch.zeros(0, dtype=torch.int64)
NEVER = 2**40
"""First column of a row that has only padding so far."""


@dataclass
class TextState:
    """What belongs to the texts of one cache besides their keys and values."""

    shift: Tensor = field(default_factory=lambda: torch.zeros(1, 1, dtype=torch.int64))
    """(B or 1, 1) int64 on the CPU: how far positions are moved back now."""
    history: History | None = None
    """What they have in memory, and the memory layers' clock, where a memory is open."""
    open_heads: Mapping[int, OpenHeads] = field(default_factory=dict)
    """Per memory layer, the heads that its memory has."""
    opened: int | None = None
    """Number of the open memory that the history belongs to."""
    has_ended: Tensor | None = None
    """(B,) bool on the CPU: rows whose last column was padding after their tokens; None is none."""
    is_broken: bool = False
    """A call began and did not end."""
    room: Room | None = None
    """The passages that are read, where some were found so far."""
    room_len: int = 0
    """Places in front of the text that are kept free for them; 0 until some were found."""
    queries: dict[int, Tensor] = field(default_factory=dict)
    """Per layer that finds passages, its last queries (B, P, T, D), scaled, free of positions."""
    queries_valid: Tensor | None = None
    """(B, T) bool on the CPU: which of them are not of padding."""
    next_search: int = 0
    """The column from which on passages are looked for again."""
    pieces: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    """Ids (B, T) of what was read, on the CPU, and which of them are not padding: passages of the
    text itself are read again. Only where passages are read."""

    def keep_queries(self, queries: dict[int, Tensor], valid: Tensor) -> None:
        """Take in those of a call, (B, T) of which are not of padding; the last ones stay."""
        for layer, new in queries.items():
            old = self.queries.get(layer)
            joined = new if old is None else torch.cat([old, new], 2)
            self.queries[layer] = joined[:, :, -LAST:]
        old_valid = self.queries_valid
        joined = valid if old_valid is None else torch.cat([old_valid, valid], 1)
        self.queries_valid = joined[:, -LAST:]

    def list_ids(self, row: int) -> Tensor:
        """(n,) int64: the tokens of a row; -1 where only embeddings were given."""
        if len(self.pieces) > 1:
            ids, valid = (torch.cat(parts, 1) for parts in zip(*self.pieces, strict=True))
            self.pieces[:] = [(ids, valid)]
        return self.pieces[0][0][row][self.pieces[0][1][row]] if self.pieces else _NOTHING

    def check(self, num_rows: int) -> None:
        """Refuse texts that a call of so many rows cannot go on with.

        Raises:
            StateError: with what to do.
        """
        if self.is_broken:
            raise StateError(
                "an earlier call on this cache was interrupted, so that its memory may hold a part "
                "of it; read the text anew with a new cache"
            )
        if self.history is not None and self.history.num_rows != num_rows:
            raise StateError(
                f"the call has {num_rows} rows and its memory {self.history.num_rows}; use a cache "
                "per batch"
            )


class WindowLayer(DynamicSlidingWindowLayer):
    """Keeps the window - 1 tokens that the next one sees, and the first `num_sinks` of the text.

    A pre-trained model puts much of its attention on the first tokens of a text, whatever they are,
    and loses its language without them (Xiao et al. 2023, "attention sinks"): so they stay. Once
    they have left the window they stand in front of the other keys.

    A call does not change the layer: `update` makes the `next` one, and makes it again where a
    backward pass computes the call again. Only what `transformers` asks of a cache layer is
    replaced here.
    """

    is_croppable = False

    def __init__(
        self, sliding_window: int, num_sinks: int, text: TextState, *, is_sliding: bool
    ) -> None:
        """Take the tokens that are seen, and whether the layer has such a window by itself.

        `transformers` sizes the masks of all layers with a window by the first of them, and those
        of the others by the first of the others.
        """
        super().__init__(sliding_window)
        self.is_sliding = is_sliding
        self.num_sinks = num_sinks
        self.text = text
        self.first_valid: Tensor | None = None
        """(B,): column of the first token of each row; None is 0."""
        self.num_begun = num_sinks
        """Columns among which the sinks of all rows are."""
        self.sink_keys: Tensor | None = None
        self.sink_values: Tensor | None = None
        self.room: tuple[Tensor, Tensor] | None = None
        """Keys and values (B, H, R, D) of passages, in one call."""
        self.next: WindowLayer | None = None

    def enter(
        self,
        first_valid: Tensor | None,
        last_first: int,
        room: tuple[Tensor, Tensor] | None = None,
    ) -> WindowLayer:
        """The layer as one call sees it, where rows begin at `first_valid`, the last one there."""
        entered = copy.copy(self)
        entered.room = room
        entered.first_valid = first_valid
        entered.num_begun = last_first + self.num_sinks
        return entered

    def count_held(self) -> int:
        """Tokens in the cache, without sinks."""
        return self.keys.shape[-2] if self.keys is not None and self.keys.dim() == 4 else 0

    def count_dropped(self) -> int:
        """Columns that were seen and are held no more, but for sinks."""
        return self.cumulative_length - self.count_held()

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Keys that a call of `query_length` tokens sees, room and sinks too; the first column."""
        held, dropped = self.count_held(), self.count_dropped()
        in_front = self.num_sinks if dropped else 0
        in_front += 0 if self.room is None else self.room[0].shape[2]
        return held + query_length + in_front, dropped

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Take in (B, H, T, D) and return what the call sees: room, sinks, held, new."""
        dropped = self.count_dropped()
        after = copy.copy(self)
        after.next = after.room = None
        if not after.is_initialized:
            after.lazy_initialization(key_states, value_states)
        assert after.keys is not None
        assert after.values is not None
        # Also where nothing is held: matrix products round by how their factors lie in memory.
        keys, values = [after.keys, key_states], [after.values, value_states]
        num_in_front = 0
        if dropped and self.sink_keys is not None and self.sink_values is not None:
            keys, values = [self.sink_keys, *keys], [self.sink_values, *values]
            num_in_front = self.num_sinks
        if self.room is not None:
            keys, values = [self.room[0], *keys], [self.room[1], *values]
            num_in_front += self.room[0].shape[2]
        seen = torch.cat(keys, -2), torch.cat(values, -2)
        after.keys, after.values = (part[:, :, num_in_front:] for part in seen)
        after.cumulative_length += key_states.shape[-2]
        after.drop(max(0, after.count_held() - self.sliding_window + 1), dropped)
        self.next = after
        return seen

    def drop(self, count: int, first: int) -> None:
        """Hold the first `count` tokens, which begin at column `first`, no more. In place."""
        keys, values = self.keys, self.values
        if not count or keys is None or values is None:
            return
        if first < self.num_begun:
            self._keep_sinks(keys, values, count, first)
        self.keys, self.values = keys[:, :, count:], values[:, :, count:]
        if count > keys.shape[2] // 2:
            # A view would keep everything in memory.
            self.keys, self.values = self.keys.clone(), self.values.clone()

    def _keep_sinks(self, keys: Tensor, values: Tensor, count: int, first: int) -> None:
        if not self.num_sinks:
            return
        if self.sink_keys is None or self.sink_values is None:
            self.sink_keys = torch.zeros_like(keys[:, :, :1]).repeat(1, 1, self.num_sinks, 1)
            self.sink_values = torch.zeros_like(values[:, :, :1]).repeat(1, 1, self.num_sinks, 1)
        places = self._place_sinks(keys) - first
        is_leaving = ((places >= 0) & (places < count))[:, None, :, None]
        where = places.clamp(0, count - 1)[:, None, :, None].expand(-1, keys.shape[1], -1, -1)
        left = [part.gather(2, where.expand(-1, -1, -1, part.shape[3])) for part in (keys, values)]
        self.sink_keys = torch.where(is_leaving, left[0], self.sink_keys)
        self.sink_values = torch.where(is_leaving, left[1], self.sink_values)

    def _place_sinks(self, keys: Tensor) -> Tensor:
        """(B, num_sinks) int64: columns of the first tokens of each row."""
        offsets = torch.arange(self.num_sinks, device=keys.device)
        if self.first_valid is None:
            return offsets.expand(keys.shape[0], -1)
        return self.first_valid.to(keys.device).unsqueeze(1) + offsets

    def detach(self) -> None:
        """Cut what is held off from the graph of the calls that wrote it. In place."""
        for name in ("keys", "values", "sink_keys", "sink_values"):
            held = getattr(self, name)
            setattr(self, name, None if held is None else held.detach())

    def reset(self) -> None:
        """Begin a new text. In place."""
        self.keys = self.values = self.sink_keys = self.sink_values = None
        self.is_initialized, self.cumulative_length = False, 0
        vars(self.text).update(vars(TextState()))

    def activate_past_recording(self) -> NoReturn:
        """Refused: see `crop`."""
        self.crop()

    def crop(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Refused: what was read is in memory, and cannot be taken back.

        Raises:
            StateError: always.
        """
        raise StateError(
            "assisted and speculative decoding reject tokens that a memory has taken in already; "
            "call generate() without an assistant model, prompt lookup or DoLa, or go on from a "
            "copy.deepcopy of the cache"
        )

    def reorder_cache(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Refused: a memory belongs to its row.

        Raises:
            StateError: always.
        """
        raise StateError(
            "beam search exchanges rows, and their memories would not follow; call generate() "
            "with num_beams=1"
        )

    batch_select_indices = batch_repeat_interleave = reorder_cache


def find_first_valid(mask: Any, num_columns: int) -> Tensor | None:
    """(B,) int64: the first column of each row that is not padding; None where all are 0."""
    if not isinstance(mask, Tensor) or mask.dim() != 2 or bool(mask[:, 0].all()):
        return None
    seen = mask[:, :num_columns].bool()
    return torch.where(seen.any(1), seen.to(torch.int8).argmax(1), NEVER)


class CallCache(DynamicCache):
    """What a model is given in the place of its cache for one call.

    The cache changes only after the call, at once and as a whole, so that a call that fails leaves
    it as it was. A layer that a backward pass computes again sees again what it saw.
    """

    def __init__(
        self, owner: DynamicCache, layers: Sequence[WindowLayer], shift: Tensor, room_len: int
    ) -> None:
        """Take the cache, its layers as the call sees them, its shift and room after the call."""
        super().__init__()
        self.owner, self.entered, self._shift = owner, tuple(layers), shift
        self._room_len = room_len
        self.layers = [*layers]
        self.layer_class_to_replicate = None

    def finish(self, *, is_cut: bool) -> None:
        """Make the call part of the cache. `is_cut`: its upper layers were left out.

        Raises:
            StateError: layers that wrote nothing.
        """
        after = [layer.next for layer in self.entered]
        if not is_cut and None in after:
            raise StateError(
                "a layer of the model wrote nothing into the cache: this family, or this release "
                "of transformers, leaves it out under gradient checkpointing; switch that off, or "
                "train without past_key_values, a text of its own in every call"
            )
        layers: list[Any] = [
            new if new is not None else old for old, new in zip(self.entered, after, strict=True)
        ]
        self.owner.layers = layers
        text = find_text(self.owner)
        text.shift, text.room_len = self._shift, self._room_len


def make_windows(
    cache: DynamicCache, own_windows: Iterable[int | None], window: int, num_sinks: int
) -> DynamicCache:
    """Let an empty cache keep a window. In place; returns it.

    Args:
        cache: what layers it has are dropped.
        own_windows: per layer, the tokens that it sees by itself, or None. Layers that see fewer
            than `window` stay as they are.
        window: tokens that are seen.
        num_sinks: first tokens that stay.
    """
    text = TextState()
    layers: list[Any] = [
        WindowLayer(own, 0, text, is_sliding=True)
        if own is not None and own <= window
        else WindowLayer(window, num_sinks, text, is_sliding=own is not None)
        for own in own_windows
    ]
    cache.layers = layers
    cache.layer_class_to_replicate = None
    return cache


def list_layers(cache: Cache) -> list[WindowLayer]:
    """The layers of a cache of ours."""
    return [layer for layer in cache.layers if isinstance(layer, WindowLayer)]


def find_text(cache: Cache) -> TextState:
    """The text of a cache; one of nothing where it is not a cache of ours."""
    layers = list_layers(cache)
    return layers[0].text if layers else TextState()


class Positions:
    """Keeps positions below the model's limit.

    Positions grow up to the limit; there a new zone begins, with smaller ones. Rotary positions
    matter by their differences only: a zone's first tokens find the cached keys moved back, all by
    as much, and go on behind them; sinks keep their place. Learned positions cannot be moved: there
    a zone starts at position 0 with a cache of nothing but sinks, so that its first tokens see
    little local context.

    Zones begin at multiples of the segment, counted in columns of the batch, so that a text has the
    same positions however its calls are cut. In a batch with left padding they begin so much
    earlier in a text as it has padding: past the model's own length its logits are close to those
    of the text alone, and not equal.
    """

    def __init__(self, decoder: Decoder, settings: MemorySettings) -> None:
        """Plan zones for a model.

        Raises:
            ConfigError: a window or segment that leaves no room for them.
        """
        self._decoder = decoder
        require(
            settings.window <= decoder.max_positions,
            "window",
            settings.window,
            f"at most {decoder.max_positions}, the positions that this model has",
        )
        # Passages stand in front of a text.
        most = decoder.max_positions - settings.room_len
        segment_len = settings.segment_len
        require(
            most >= segment_len or not settings.room_len,
            "num_passages, passage_len",
            (settings.num_passages, settings.passage_len),
            f"less: they take {settings.room_len} positions for passages, and the model has "
            f"{decoder.max_positions} for these and a text",
        )
        self.limit = most // segment_len * segment_len
        require(
            settings.window <= self.limit,
            "window",
            settings.window,
            f"at most {self.limit}, the positions this model has ({most}"
            + (f", without {settings.room_len} for passages" if settings.room_len else "")
            + f") in whole segments of {segment_len}",
        )
        self.is_learned = decoder.family.positions == "learned"
        overlap = 0
        if not self.is_learned:
            window = -(-settings.window // segment_len) * segment_len
            overlap = min(window, self.limit - segment_len)
            # Else a later zone would begin where the sinks are, and see them as tokens to come.
            require(
                overlap > 0 or not settings.num_sinks,
                "segment_len",
                segment_len,
                f"at most {most // 2}, half of the positions this model has ({most}), or "
                "num_sinks=0",
            )
        self._overlap, self._zone_len = overlap, self.limit - overlap

    def find_zone(self, column: int) -> int:
        """The zone of a column of the cache, from 0."""
        return max(0, (column - self._overlap) // self._zone_len)

    def find_first_seen(self, column: int) -> int:
        """The first column that `column` may see, if the window were endless."""
        return self.find_zone(column) * self._zone_len if self.is_learned else 0

    def check(self, start: int, num_tokens: int) -> None:
        """Refuse a call over the end of a zone.

        Raises:
            StateError: with the most tokens that may follow.
        """
        zone = self.find_zone(start)
        if num_tokens and zone != self.find_zone(start + num_tokens - 1):
            most = self._overlap + (zone + 1) * self._zone_len - start
            raise StateError(
                f"a call reads {num_tokens} tokens at once, and here the model has positions for "
                f"{most} more; read in pieces of segment_len with a cache (generate() does, with "
                "input_ids and use_cache=True)"
            )

    def begins_zone(self, column: int) -> bool:
        """Whether positions are moved back at a column of the cache."""
        return column > 0 and self.find_zone(column) != self.find_zone(column - 1)

    def find_position(self, token: Tensor, start: int, shift: Tensor, room_len: int) -> Tensor:
        """(B or 1, 1): where a token of each row stands in a call; of rotary positions.

        Args:
            token: (B or 1,), counted from the beginning of its row.
            start: columns seen before the call.
            shift: (B or 1, 1) before the call.
            room_len: places in front of the text that the call makes free.
        """
        moved = self._zone_len if self.begins_zone(start) else 0
        return token.unsqueeze(1) + room_len - shift - moved

    def make_room(self, layers: list[WindowLayer], shift: Tensor, length: int) -> Tensor:
        """Move a text back by so many places. What its layers hold moves, in place.

        Returns:
            How far positions are moved back from now on, where it was `shift`.
        """
        for number, layer in enumerate(layers):
            if not self._decoder.rotated[number]:
                continue
            for name in ("keys", "sink_keys"):
                held = getattr(layer, name)
                if held is not None and held.numel():
                    turned = self._decoder.rotate_back(number, held, torch.tensor([[-length]]))
                    setattr(layer, name, turned)
        return shift - length

    def enter(
        self,
        layers: list[WindowLayer],
        start: int,
        position_ids: Tensor,
        shift: Tensor,
        room_len: int,
    ) -> Tensor:
        """How far positions are moved back from column `start` on.

        Args:
            layers: of the call. Where a zone begins, what they hold moves, in place.
            start: columns seen so far.
            position_ids: (B or 1, T) of the call, not moved.
            shift: (B or 1, 1) int64 so far.
            room_len: places in front of the text that are taken.
        """
        if not self.begins_zone(start):
            return shift
        if not self.is_learned:
            distance = torch.tensor([[self._zone_len]])
            for number, layer in enumerate(layers):
                if layer.keys is not None and layer.count_held() and self._decoder.rotated[number]:
                    layer.keys = self._decoder.rotate_back(number, layer.keys, distance)
            return shift + self._zone_len
        for layer in layers:
            layer.drop(layer.count_held(), layer.count_dropped())
        first = position_ids[:, :1]
        if layers[0].first_valid is not None:
            # The position of padding means nothing: `generate` says 0 or 1.
            is_padding = layers[0].first_valid.to(first.device).unsqueeze(1) > start
            first = torch.where(is_padding & (first <= 1), 0, first)
        return first.cpu() - room_len
