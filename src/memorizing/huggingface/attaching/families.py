"""What differs between model families: where attention is, and how positions are put into keys."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from memorizing.errors import ConfigError
from memorizing.settings import require


@dataclass(frozen=True)
class Family:
    """Names inside of a decoder of `transformers`."""

    layers: str = "layers"
    """The list of layers in the base model."""
    attention: str = "self_attn"
    """The attention in a layer."""
    positions: str = "rotary"
    """`rotary`: rotated keys, undone in what is stored; `learned`: added to the embeddings."""
    rotary_per_type: bool = False
    """Whether the rotary module wants the type of a layer."""


FAMILIES: dict[str, Family] = {
    "gemma": Family(),
    "gemma2": Family(),
    "gemma3_text": Family(rotary_per_type=True),
    "gpt2": Family("h", "attn", "learned"),
    "gpt_neox": Family(attention="attention"),
    "llama": Family(),
    "mistral": Family(),
    "olmo2": Family(),
    "phi3": Family(),
    "qwen2": Family(),
    "qwen3": Family(),
    "smollm3": Family(),
}
"""By `config.model_type`; each is tested. Others are taken as `Family()` where they look alike."""


@dataclass(frozen=True)
class Decoder:
    """A model seen by its attention layers."""

    base: Any
    """The base model, which holds the layers."""
    family: Family
    attentions: tuple[nn.Module, ...]
    own_windows: tuple[int | None, ...]
    """Per layer, the tokens that it sees by itself; None is all."""

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

    def look_up_rotation(self, layer: int, position: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines (B, n, rotary_dim) of positions (B, n), as `layer` gets them for `x`.

        They are in float32.
        """
        arguments = (x.new_empty(0, dtype=torch.float32), position.to(x.device))
        if self.family.rotary_per_type:
            return self.base.rotary_emb(*arguments, self.base.config.layer_types[layer])
        return self.base.rotary_emb(*arguments)

    def is_rotated(self, layer: int) -> bool:
        """Whether the layer's queries and keys are rotated; SmolLM 3 leaves every fourth as is."""
        attention = self.attentions[layer]
        return self.family.positions == "rotary" and bool(getattr(attention, "use_rope", True))

    def count_heads(self, layer: int) -> tuple[int, int]:
        """Heads of queries and of keys."""
        num_heads = int(self.base.config.num_attention_heads)
        num_groups = int(getattr(self.attentions[layer], "num_key_value_groups", 1))
        return num_heads, num_heads // num_groups

    def count_head_dim(self, layer: int) -> int:
        """Length of a key."""
        attention, config = self.attentions[layer], self.base.config
        size = getattr(attention, "head_dim", None) or getattr(attention, "head_size", None)
        return int(size or config.hidden_size // config.num_attention_heads)


def find_decoder(model: Any) -> Decoder:
    """The decoder inside of a causal language model of `transformers`.

    Raises:
        ConfigError: a family that keeps its attention elsewhere, or does not call attention
            through `AttentionInterface`.
    """
    base = model.base_model
    kind = str(model.config.model_type)
    family = FAMILIES.get(kind, Family())
    layers = getattr(base, family.layers, None)
    if isinstance(layers, nn.ModuleList) and getattr(base, "_supports_attention_backend", False):
        attentions = [getattr(layer, family.attention, None) for layer in layers]
        own_windows = _find_own_windows(base.config, len(layers))
        modules = tuple(module for module in attentions if isinstance(module, nn.Module))
        if (
            len(modules) == len(layers)
            and own_windows is not None
            and (
                family.positions == "learned"
                or (find_rotation(modules[0]) and getattr(base, "rotary_emb", None) is not None)
            )
        ):
            return Decoder(base, family, modules, own_windows)
    raise ConfigError(
        f"a {type(model).__name__} (model_type {kind!r}) cannot be given a memory: its layers are "
        "not laid out as in the families that are known, or do not call attention through "
        f"AttentionInterface; known: {', '.join(sorted(FAMILIES))}"
    )


def _find_own_windows(config: Any, num_layers: int) -> tuple[int | None, ...] | None:
    """See `Decoder.own_windows`; None where the model keeps something else than keys and values."""
    layers = DynamicCache(config=config).layers or [DynamicLayer() for _ in range(num_layers)]
    if len(layers) != num_layers:
        return None
    if any(type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer) for layer in layers):
        return None
    return tuple(getattr(layer, "sliding_window", None) for layer in layers)


def find_rotation(attention: Any) -> Callable[..., tuple[Tensor, Tensor]] | None:
    """The family's own function that rotates queries and keys."""
    return getattr(sys.modules[type(attention).__module__], "apply_rotary_pos_emb", None)


def find_eager_attention(attention: nn.Module) -> Callable[..., tuple[Tensor, Tensor | None]]:
    """The family's own attention in plain operations."""
    return sys.modules[type(attention).__module__].eager_attention_forward


def rotate_back(attention: nn.Module, x: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
    """Rotate (B, H, n, D) by minus the angles of `rotation` (B or 1, n, rotary_dim).

    Some families (YaRN) make what they rotate longer by the way; it stays so, and the product of a
    query and a key is that of local attention at distance 0.
    """
    apply = find_rotation(attention)
    assert apply is not None
    cos, sin = rotation
    length = torch.sqrt(cos.square() + sin.square())
    exact = x.float()
    return apply(exact, exact[:, :1], cos / length, -sin / length)[0].to(x.dtype)


def check_heads(heads: Mapping[int, Sequence[int]], layers: Sequence[int], num_heads: int) -> None:
    """Refuse heads that are not there, or of other layers.

    Raises:
        ConfigError: with the heads seen.
    """
    for layer, given in heads.items():
        require(
            layer in layers and bool(given) and all(0 <= head < num_heads for head in given),
            f"heads[{layer}]",
            list(given),
            f"one or more from 0 to {num_heads - 1}, of the memory layers {list(layers)}",
        )


def check_layers(layers: tuple[int, ...], num_layers: int) -> None:
    """Refuse layers that are not there, or are named twice.

    Raises:
        ConfigError: with the layers seen.
    """
    require(
        bool(layers) and all(0 <= layer < num_layers for layer in layers),
        "layers",
        list(layers),
        f"one or more from 0 to {num_layers - 1}, counted from 0 (this model has {num_layers})",
    )
    require(len(set(layers)) == len(layers), "layers", list(layers), "each layer once")


def choose_dtype(name: str) -> torch.dtype:
    """The torch dtype of a setting."""
    return {
        "bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32
    }[name]  # fmt: skip
