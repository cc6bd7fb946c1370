"""What differs between model families: where attention is, and how positions are put into keys."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

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

    @property
    def max_positions(self) -> int:
        """Positions that the model has seen in its training (before any scaling of them)."""
        config = self.base.config
        rope = getattr(config, "rope_parameters", None) or {}
        original = rope.get("original_max_position_embeddings")
        limit = int(config.max_position_embeddings)
        return min(limit, int(original)) if original else limit

    def look_up_rotation(self, layer: int, position: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines (1, n, rotary_dim) of positions (n,), as `layer` gets them."""
        arguments = (x, position.unsqueeze(0).to(x.device))
        if self.family.rotary_per_type:
            return self.base.rotary_emb(*arguments, self.base.config.layer_types[layer])
        return self.base.rotary_emb(*arguments)

    def is_rotated(self, layer: int) -> bool:
        """Whether the layer's queries and keys are rotated; SmolLM 3 leaves every fourth as is."""
        attention = self.attentions[layer]
        return self.family.positions == "rotary" and bool(getattr(attention, "use_rope", True))


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
        attentions = tuple(getattr(layer, family.attention, None) for layer in layers)
        if all(isinstance(attention, nn.Module) for attention in attentions) and (
            family.positions == "learned"
            or (find_rotation(attentions[0]) and getattr(base, "rotary_emb", None) is not None)
        ):
            return Decoder(base, family, attentions)  # type: ignore[arg-type]
    raise ConfigError(
        f"a {type(model).__name__} (model_type {kind!r}) cannot be given a memory: its layers are "
        "not laid out as in the families that are known, or do not call attention through "
        f"AttentionInterface; known: {', '.join(sorted(FAMILIES))}"
    )


def find_rotation(attention: Any) -> Callable[..., tuple[Tensor, Tensor]] | None:
    """The family's own function that rotates queries and keys."""
    return getattr(sys.modules[type(attention).__module__], "apply_rotary_pos_emb", None)


def find_eager_attention(attention: nn.Module) -> Callable[..., tuple[Tensor, Tensor | None]]:
    """The family's own attention in plain operations."""
    return sys.modules[type(attention).__module__].eager_attention_forward


def rotate_back(
    attention: nn.Module, x: Tensor, rotation: tuple[Tensor, Tensor], *, keep_norm: bool = False
) -> Tensor:
    """Rotate (B, H, n, D) by minus the angles of `rotation` (B or 1, n, rotary_dim).

    Some families (YaRN) scale cosines and sines, and so what they rotate; that is undone too,
    unless `keep_norm`.
    """
    apply = find_rotation(attention)
    assert apply is not None
    cos, sin = rotation
    square = cos.square() + sin.square()
    divisor = square.sqrt() if keep_norm else square
    return apply(x, x, cos / divisor, -sin / divisor)[0]


def rotate(attention: nn.Module, x: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
    """Rotate (B, H, n, D) as the family does."""
    apply = find_rotation(attention)
    assert apply is not None
    return apply(x, x, *rotation)[0]


def count_heads(attention: nn.Module, config: Any) -> tuple[int, int]:
    """Heads of queries and of keys."""
    num_heads = int(config.num_attention_heads)
    return num_heads, num_heads // int(getattr(attention, "num_key_value_groups", 1))


def count_head_dim(attention: Any, config: Any) -> int:
    """Length of a key."""
    size = getattr(attention, "head_dim", None) or getattr(attention, "head_size", None)
    return int(size or config.hidden_size // config.num_attention_heads)


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
