"""The attention and mask functions that `transformers` calls in a model with memory.

Two names are registered, one per implementation that is underneath: `memorizing` runs local
attention by `sdpa`, `memorizing_eager` by the family's own plain operations. Both give exactly what
is underneath where no memory is read and the text is no longer than the window.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import (
    ALL_MASK_ATTENTION_FUNCTIONS,
    and_masks,
    or_masks,
    sliding_window_overlay,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from memorizing.errors import ConfigError
from memorizing.huggingface.attaching.memory_layer import MemoryLayer

NAMES = {"sdpa": "memorizing", "eager": "memorizing_eager"}
"""What is underneath -> what is registered. `transformers` reads meaning into names that hold
`sdpa`, `flash` or `flex_attention`."""


STEP = "memorizing_step"
"""Keyword argument by which the base model hands the `Step` of a call down to its attention; in a
trial call a dict, which gets every `Attention` by its module."""


class Attention(NamedTuple):
    """What attention was given, and gave."""

    query: Tensor
    key: Tensor
    value: Tensor
    mask: Tensor | None
    scaling: float | None
    kwargs: dict[str, Any]
    output: Tensor


@dataclass(frozen=True)
class CallWindow:
    """What local attention sees in the call that is running."""

    window: int
    num_sinks: int
    first_valid: Tensor | None
    """(B,): column of the first token of each row; None is 0."""
    room_first: Tensor | None = None
    """(B,) on the CPU: the first place of each row's room in which something stands; None is no
    room."""
    room_len: int = 0
    """Places of the room, in front of everything."""
    room_before: Tensor | None = None
    """(B or 1,) on the CPU: the token of each row that it stands before; None is the first."""


WINDOW: ContextVar[CallWindow | None] = ContextVar("memorizing_window", default=None)
"""Of the model that is running."""


def name_implementation(current: str | None) -> str:
    """The registered name for a model whose implementation of attention is `current`.

    Raises:
        ConfigError: an implementation that is not known.
    """
    if current in NAMES:
        return NAMES[current]
    raise ConfigError(
        f"the model's attention runs by {current!r}; a memory is known to work over "
        f"{' and '.join(map(repr, NAMES))}: load the model with attn_implementation='sdpa', or "
        "'eager' where its family has no other, or call model.set_attn_implementation('sdpa')"
    )


def _make_attention(underneath: str) -> Callable[..., tuple[Tensor, Tensor | None]]:
    def attend(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        scaling: float | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """Local attention as before; then what a memory layer adds."""
        step = kwargs.pop(STEP, None)
        run = ALL_ATTENTION_FUNCTIONS.get_interface(underneath, _find_eager(module))
        output, weights = run(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
        layer = module._modules.get("memory")
        seen = Attention(query, key, value, attention_mask, scaling, kwargs, output)
        if isinstance(step, dict):
            step.setdefault(module, []).append(seen)
        elif step is not None and isinstance(layer, MemoryLayer):
            output = step.add(layer, seen)
        elif step is not None and step.mode.collected is not None:
            step.collect(module, seen)
        return output, weights

    return attend


def _find_eager(attention: nn.Module) -> Callable[..., tuple[Tensor, Tensor | None]]:
    """The family's own attention in plain operations."""
    return sys.modules[type(attention).__module__].eager_attention_forward


def _make_mask(underneath: str) -> Callable[..., Tensor | None]:
    def mask(*, kv_length: int, **kwargs: Any) -> Tensor | None:
        """The mask underneath; where the text is longer than the window, narrowed to it."""
        view = WINDOW.get()
        if view is None or view.room_first is None:
            return mask_text(view, kv_length=kv_length, **kwargs)
        kwargs["allow_is_causal_skip"] = False
        made = mask_text(view, kv_length=kv_length - view.room_len, **kwargs)
        assert made is not None
        made = made.expand(kwargs["batch_size"], -1, -1, -1)
        shown = _show_room(view, made, kwargs.get("q_offset", 0), kwargs.get("local_size"))
        return torch.cat([shown, made], -1)

    def mask_text(
        view: CallWindow | None,
        *,
        batch_size: int,
        q_length: int,
        kv_length: int,
        q_offset: int = 0,
        kv_offset: int = 0,
        mask_function: Callable[..., Any],
        local_size: int | None = None,
        **kwargs: Any,
    ) -> Tensor | None:
        """The mask of everything but the room."""
        make = partial(
            ALL_MASK_ATTENTION_FUNCTIONS[underneath],
            batch_size=batch_size,
            q_length=q_length,
            q_offset=q_offset,
            kv_offset=kv_offset,
            **kwargs,
        )
        if view is None or q_offset + q_length <= view.window:
            return make(kv_length=kv_length, mask_function=mask_function, local_size=local_size)
        num_columns = q_offset + q_length - kv_offset
        has_sinks = kv_length > num_columns
        if local_size is None or local_size > view.window:
            narrow = and_masks(mask_function, sliding_window_overlay(view.window))
            if view.num_sinks:
                narrow = or_masks(narrow, _see_sinks(view))
            make = partial(make, allow_is_causal_skip=False)
            made = make(kv_length=num_columns, mask_function=narrow, local_size=view.window)
            num_seen = kv_offset
        else:  # a window of the layer's own
            if has_sinks:
                make = partial(make, allow_is_causal_skip=False)
            made = make(kv_length=num_columns, mask_function=mask_function, local_size=local_size)
            num_seen = 0
        if not has_sinks or made is None:
            return made
        return torch.cat([_show_dropped_sinks(view, made, num_seen), made], -1)

    return mask


def _show_room(view: CallWindow, mask: Tensor, q_offset: int, local_size: int | None) -> Tensor:
    """(B, 1, T, R) like `mask`: the places of the room that each token sees.

    A layer with a window of its own sees what lies in it.
    """
    assert view.room_first is not None
    place = torch.arange(view.room_len)
    seen = (place >= view.room_first.view(-1, 1))[:, None]
    if local_size is not None:
        token = torch.arange(mask.shape[2]) + q_offset
        first = torch.zeros(1) if view.first_valid is None else view.first_valid.cpu()
        first = first if view.room_before is None else first + view.room_before
        distance = view.room_len + (token - first.view(-1, 1)).unsqueeze(-1) - place
        seen = seen & (distance < local_size)
    return _put_like(mask, seen)


def _see_sinks(view: CallWindow) -> Callable[..., Any]:
    """Mask function: the first tokens of a text, for those that follow them."""

    def is_sink(batch_idx: Any, head_idx: Any, q_idx: Any, kv_idx: Any) -> Any:
        first = 0
        if view.first_valid is not None:
            first = view.first_valid.to(kv_idx.device)[batch_idx]
        return (kv_idx >= first) & (kv_idx < first + view.num_sinks) & (kv_idx <= q_idx)

    return is_sink


def _show_dropped_sinks(view: CallWindow, mask: Tensor, num_dropped: int) -> Tensor:
    """(B, 1, T, num_sinks) like `mask`: sinks that stand in front, since they left the window.

    They are seen where they are among the first `num_dropped` columns.
    """
    first = torch.zeros(1, dtype=torch.int64) if view.first_valid is None else view.first_valid
    places = first.to(mask.device).unsqueeze(1) + torch.arange(view.num_sinks, device=mask.device)
    return _put_like(mask, (places < num_dropped)[:, None])


def _put_like(mask: Tensor, seen: Tensor) -> Tensor:
    """(B, 1, T, n) like `mask`: what is seen, (B or 1, T or 1, n) bool."""
    seen = seen.unsqueeze(1).expand(mask.shape[0], 1, mask.shape[2], -1).to(mask.device)
    if mask.dtype == torch.bool:
        return seen
    least = torch.finfo(mask.dtype).min
    return torch.zeros(seen.shape, dtype=mask.dtype, device=mask.device).masked_fill(~seen, least)


for _underneath, _name in NAMES.items():
    AttentionInterface.register(_name, _make_attention(_underneath))
    AttentionMaskInterface.register(_name, _make_mask(_underneath))
