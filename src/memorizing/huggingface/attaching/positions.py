"""Positions that the model was trained on, whatever the length of the text."""

from __future__ import annotations

import torch
from torch import Tensor

from memorizing.errors import StateError
from memorizing.huggingface.attaching.families import Decoder, rotate_back
from memorizing.huggingface.attaching.memory_settings import MemorySettings
from memorizing.huggingface.attaching.window_cache import WindowLayer
from memorizing.settings import require


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
        most, segment_len = decoder.max_positions, settings.segment_len
        self.limit = most // segment_len * segment_len
        require(
            settings.window <= self.limit,
            "window",
            settings.window,
            f"at most {self.limit}, the positions this model has ({most}) in whole segments of "
            f"{segment_len}",
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
                f"{most} more; read in pieces of segment_len (generate() does, with the "
                "prefill_chunk_size that add_memory sets)"
            )

    def enter(
        self, layers: list[WindowLayer], start: int, position_ids: Tensor, shift: Tensor
    ) -> Tensor:
        """How far positions are moved back from column `start` on.

        Args:
            layers: of the call. Where a zone begins, what they hold moves, in place.
            start: columns seen so far.
            position_ids: (B or 1, T) of the call, not moved.
            shift: (B or 1, 1) int64 so far.
        """
        if not start or self.find_zone(start) == self.find_zone(start - 1):
            return shift
        if not self.is_learned:
            for number, layer in enumerate(layers):
                self._move_back(number, layer)
            return shift + self._zone_len
        for layer in layers:
            layer.drop(layer.count_held(), layer.count_dropped())
        first = position_ids[:, :1]
        if layers[0].first_valid is not None:
            # The position of padding means nothing: `generate` says 0 or 1.
            is_padding = layers[0].first_valid.to(first.device).unsqueeze(1) > start
            first = torch.where(is_padding & (first <= 1), 0, first)
        return first.cpu()

    def _move_back(self, number: int, layer: WindowLayer) -> None:
        if layer.keys is None or not layer.count_held() or not self._decoder.is_rotated(number):
            return
        distance = torch.tensor([[self._zone_len]])
        rotation = self._decoder.look_up_rotation(number, distance, layer.keys)
        layer.keys = rotate_back(self._decoder.attentions[number], layer.keys, rotation)
