"""A model seen by its attention layers: where they are, and how they rotate queries and keys."""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Family:
    """Names inside of a decoder of `transformers`."""

    layers: str = "layers"
    """The list of layers in the base model."""
    attention: str = "self_attn"
    """The attention in a layer."""
    positions: str = "rotary"
    """`rotary`: rotated keys, undone in what is stored; `learned`: added to the embeddings."""


@dataclass(frozen=True)
class Decoder:
    """A model seen by its attention layers."""

    base: Any
    """The base model, which holds the layers."""
    family: Family
    attentions: tuple[nn.Module, ...]
    own_windows: tuple[int | None, ...]
    """Per layer, the tokens that it sees by itself; None is all."""
    num_cached: int
    """Layers that have keys of their own; those above (Gemma 3n) attend to those of one below."""
    rotated: tuple[bool, ...] = ()
    """Per layer, whether it rotates queries and keys."""
    shapes: tuple[tuple[int, int, int], ...] = ()
    """Per layer, heads of queries, heads of keys, and the length of a key."""

    @property
    def max_positions(self) -> int:
        """Positions that the model can count; with "longrope" those before it counts otherwise."""
        config = self.base.config
        most = int(config.max_position_embeddings)
        rope = getattr(config, "rope_parameters", None) or {}
        for values in (rope, *rope.values()):
            if isinstance(values, dict) and values.get("rope_type") == "longrope":
                original = values.get("original_max_position_embeddings")
                original = original or getattr(config, "original_max_position_embeddings", None)
                most = min(most, int(original or most))
        return most

    @functools.cached_property
    def _layer_types(self) -> Sequence[str] | None:
        """What the rotary module wants besides positions, where it has angles per type of layer."""
        wanted = inspect.signature(self.base.rotary_emb.forward).parameters
        return self.base.config.layer_types if "layer_type" in wanted else None

    def look_up_rotation(self, layer: int, position: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines (B, n, rotary_dim) of positions (B, n), as `layer` gets them for `x`.

        They are in float32.
        """
        arguments = (x.new_empty(0, dtype=torch.float32), position.to(x.device))
        types = self._layer_types
        return self.base.rotary_emb(*arguments, *(() if types is None else (types[layer],)))

    def free_entries(
        self, layer: int, key: Tensor, value: Tensor, kwargs: dict[str, Any]
    ) -> tuple[Tensor, Tensor]:
        """Keys (B, H_kv, T, D) of a call without their positions, and values; without gradient.

        Values that are shorter are filled up with zeros.
        """
        key, value = key.detach(), value.detach()
        if self.rotated[layer]:
            key = self.rotate_back(layer, key, kwargs["position_ids"])
        return key, nn.functional.pad(value, (0, key.shape[-1] - value.shape[-1]))

    def rotate_back(self, layer: int, x: Tensor, position: Tensor) -> Tensor:
        """Rotate queries or keys (B, H, n, D) of a layer back by positions (B or 1, n).

        Some families (YaRN) make what they rotate longer by the way; it stays so, and the product
        of a query and a key is that of local attention at distance 0.
        """
        attention = self.attentions[layer]
        apply = find_rotation(attention)
        assert apply is not None
        cos, sin = self.look_up_rotation(layer, position, x)
        length = torch.sqrt(cos.square() + sin.square())
        # Phi and Persimmon hand over no more than what is rotated.
        width = getattr(attention, "rotary_ndims", x.shape[-1])
        exact = x[..., :width].float()
        pair = (exact,) if _takes_one(apply) else (exact, exact[:, :1])
        turned = apply(*pair, cos / length, -sin / length)
        turned = (turned if len(pair) == 1 else turned[0]).to(x.dtype)
        return turned if width == x.shape[-1] else torch.cat([turned, x[..., width:]], -1)


def find_rotation(attention: nn.Module) -> Callable[..., Any] | None:
    """The family's own function that rotates queries and keys, or one of them."""
    return getattr(sys.modules[type(attention).__module__], "apply_rotary_pos_emb", None)


@functools.cache
def _takes_one(apply: Callable[..., Any]) -> bool:
    """Whether a family rotates queries by themselves: (x, cos, sin)."""
    return next(iter(inspect.signature(apply).parameters)) == "x"
