"""The attention and mask functions that `transformers` calls in a model with memory.

Two names are registered, one per implementation that is underneath: `memorizing` runs local
attention by `sdpa`, `memorizing_eager` by the family's own plain operations. Both give exactly what
is underneath where no memory is read and the text is no longer than the window.
"""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import (
    ALL_MASK_ATTENTION_FUNCTIONS,
    and_masks,
    sliding_window_overlay,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from memorizing.errors import ConfigError
from memorizing.huggingface.families import find_eager_attention
from memorizing.huggingface.memory_layer import MemoryLayer

NAMES = {"sdpa": "memorizing", "eager": "memorizing_eager"}
"""What is underneath -> what is registered. `transformers` reads meaning into names that hold
`sdpa`, `flash` or `flex_attention`."""

WINDOW: ContextVar[int | None] = ContextVar("memorizing_window", default=None)
"""Window of the model that is running."""


def name_implementation(current: str | None) -> str:
    """The registered name for a model whose implementation of attention is `current`.

    Raises:
        ConfigError: an implementation that is not known.
    """
    if current in NAMES:
        return NAMES[current]
    raise ConfigError(
        f"the model's attention runs by {current!r}; a memory is known to work over "
        f"{' and '.join(map(repr, NAMES))}: load the model with attn_implementation='sdpa', or call "
        "model.set_attn_implementation('sdpa')"
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
        run = ALL_ATTENTION_FUNCTIONS.get_interface(underneath, find_eager_attention(module))
        output, weights = run(
            module, query, key, value, attention_mask, scaling=scaling, **kwargs
        )
        layer = module._modules.get("memory")
        if isinstance(layer, MemoryLayer):
            output = layer.add(module, query, key, value, attention_mask, scaling, kwargs, output)
        return output, weights

    return attend


def _make_mask(underneath: str) -> Callable[..., Tensor | None]:
    def mask(
        *,
        q_length: int,
        kv_length: int,
        q_offset: int = 0,
        mask_function: Callable[..., Any],
        local_size: int | None = None,
        **kwargs: Any,
    ) -> Tensor | None:
        """The mask underneath, narrowed to the window where the text is longer."""
        window = WINDOW.get()
        if window is not None and q_offset + q_length > window:
            mask_function = and_masks(mask_function, sliding_window_overlay(window))
            local_size = min(window, local_size or window)
        return ALL_MASK_ATTENTION_FUNCTIONS[underneath](
            q_length=q_length,
            kv_length=kv_length,
            q_offset=q_offset,
            mask_function=mask_function,
            local_size=local_size,
            **kwargs,
        )

    return mask


for _underneath, _name in NAMES.items():
    AttentionInterface.register(_name, _make_attention(_underneath))
    AttentionMaskInterface.register(_name, _make_mask(_underneath))
