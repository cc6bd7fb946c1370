"""A cache of the last tokens only, with positions that never leave what the model was trained on."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicSlidingWindowLayer

from memorizing.errors import StateError
from memorizing.huggingface.families import Decoder, rotate_back


class WindowLayer(DynamicSlidingWindowLayer):
    """Keeps the window - 1 tokens that the next one sees, and cannot go back.

    Only what `transformers` asks of a cache layer is replaced here: its base class is no part of
    this library.
    """

    def __init__(self, sliding_window: int, *, is_sliding: bool) -> None:
        """Take the tokens that are seen, and whether the layer has such a window by itself.

        `transformers` sizes the masks of all layers with a window by the first of them, and those
        of the others by the first of the others.
        """
        super().__init__(sliding_window)
        self.is_sliding = is_sliding

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length and first index of the keys that a call of `query_length` tokens sees."""
        held = self.count_held()
        return held + query_length, self.cumulative_length - held

    def count_held(self) -> int:
        """Tokens in the cache."""
        return self.keys.shape[-2] if self.is_initialized and self.keys.dim() == 4 else 0

    def clear(self) -> None:
        """Forget the tokens, but not how many there were."""
        if self.is_initialized:
            self.keys, self.values = self.keys[:, :, :0], self.values[:, :, :0]

    def detach(self) -> None:
        """Cut the cache off from the graph of the call that wrote it."""
        if self.is_initialized:
            self.keys, self.values = self.keys.detach(), self.values.detach()

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


def make_window_cache(decoder: Decoder, window: int) -> DynamicCache:
    """An empty cache of the model; layers with a shorter window of their own keep it."""
    cache = DynamicCache(config=decoder.base.config)
    shorten(cache, decoder, window)
    return cache


def shorten(cache: DynamicCache, decoder: Decoder, window: int) -> None:
    """Give an empty cache layers of at most `window` tokens. In place."""
    own = [getattr(layer, "sliding_window", None) for layer in cache.layers]
    own += [None] * (len(decoder.attentions) - len(own))
    cache.layers = [
        WindowLayer(min(window, length or window), is_sliding=length is not None) for length in own
    ]
    cache.layer_class_to_replicate = None


def count_seen(cache: DynamicCache) -> int:
    """Tokens that went through a cache, padding included."""
    return int(cache.get_seq_length())


def move_back(cache: DynamicCache, decoder: Decoder, num_positions: int) -> None:
    """Rotate all cached keys as if they stood `num_positions` earlier. In place."""
    for index, (layer, attention) in enumerate(zip(cache.layers, decoder.attentions, strict=True)):
        if decoder.is_rotated(index) and layer.count_held():
            position = torch.tensor([num_positions])
            rotation = decoder.look_up_rotation(index, position, layer.keys)
            layer.keys = rotate_back(attention, layer.keys, rotation, keep_norm=True)


def place(
    cache: DynamicCache,
    decoder: Decoder,
    limit: int,
    shift: Tensor,
    position_ids: Tensor,
) -> Tensor:
    """Keep positions below the model's limit: how far those of this call are moved back from now.

    Rotary positions only matter by their differences: at the limit, cached keys are moved back
    together with all that follows. Learned positions cannot be moved: there the cache is cleared
    and positions start anew, so that the first tokens after it see little local context.

    Args:
        cache: of this model. Changed in place where positions move.
        decoder: the model.
        limit: positions that there are.
        shift: (B or 1, 1) how far positions were moved back so far.
        position_ids: (B or 1, T), not moved.

    Raises:
        StateError: more tokens at once than the model has positions.
    """
    if int((position_ids - shift).max()) < limit:
        return shift
    num_tokens, start = position_ids.shape[1], count_seen(cache)
    if decoder.family.positions == "learned":
        held = cache.layers[0].count_held()
        if num_tokens > limit or (start and start % limit and held and num_tokens > 1):
            raise _refuse_length(num_tokens, limit - start % limit)
        for layer in cache.layers:
            layer.clear()
        return position_ids[:, :1].clone()
    held = max(layer.count_held() for layer in cache.layers)
    if num_tokens + held > limit:
        raise _refuse_length(num_tokens, limit - held)
    moved = int((position_ids - shift)[:, 0].min()) - held
    move_back(cache, decoder, moved)
    return shift + moved


def _refuse_length(num_tokens: int, most: int) -> StateError:
    return StateError(
        f"a call reads {num_tokens} tokens at once, and here the model has positions for {most}; "
        "read in pieces of segment_len (generate() does with prefill_chunk_size, as add_memory "
        "sets it)"
    )


def list_positions(kwargs: dict[str, Any], num_tokens: int, start: int) -> Tensor:
    """Position ids of a call, given or what `transformers` would take."""
    given = kwargs.get("position_ids")
    if given is not None:
        return given
    return (torch.arange(num_tokens) + start).unsqueeze(0)
