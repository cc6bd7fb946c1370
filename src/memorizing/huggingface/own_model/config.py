"""The configuration of our own model, as `transformers` reads and writes it."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

from transformers import PreTrainedConfig

from memorizing.config import ModelConfig
from memorizing.settings import build_dataclass

_SETTINGS = tuple(field.name for field in dataclasses.fields(ModelConfig))


class MemorizingTransformerConfig(PreTrainedConfig):
    """The settings of `ModelConfig` by their own names, and what `transformers` keeps beside them.

    `config.json` holds them flat, as in the checkpoints of our training. `capacity` and `index` may
    be changed at any time, also in `from_pretrained(path, capacity=65_536)`: they hold from the
    next document on. The other settings belong to the weights.
    """

    model_type = "memorizing_transformer"
    attribute_map: ClassVar[dict[str, str]] = {
        "hidden_size": "model_dim",
        "intermediate_size": "ffn_dim",
        "num_attention_heads": "num_heads",
        "num_hidden_layers": "num_layers",
    }
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["past_key_values", "cache"]

    def __init__(self, *, use_cache: bool = True, **values: Any) -> None:
        """Take settings of `ModelConfig`, and any that `transformers` knows.

        Args:
            use_cache: whether calls without gradient return their history where they do not say.
            values: what is left out has the default of `ModelConfig`.

        Raises:
            ConfigError: a setting of the wrong type or out of range.
        """
        values = {self.attribute_map.get(name, name): value for name, value in values.items()}
        for fixed in ("model_type", "tie_word_embeddings"):
            values.pop(fixed, None)
        settings = {name: values.pop(name) for name in _SETTINGS if name in values}
        for name, value in dataclasses.asdict(_build(settings)).items():
            setattr(self, name, list(value) if isinstance(value, tuple) else value)
        self.use_cache = use_cache
        # One matrix embeds tokens and gives logits: there is nothing to tie, and nothing to untie.
        self.tie_word_embeddings = True
        super().__init__(**values)

    @classmethod
    def from_model_config(cls, config: ModelConfig, **values: Any) -> MemorizingTransformerConfig:
        """The same settings; `values` are those of `transformers`."""
        return cls(**dataclasses.asdict(config), **values)

    def to_model_config(self) -> ModelConfig:
        """The settings as they are now.

        Raises:
            ConfigError: a setting was changed to what cannot work.
        """
        return _build({name: getattr(self, name) for name in _SETTINGS})


def _build(settings: dict[str, Any]) -> ModelConfig:
    return build_dataclass(ModelConfig, settings, "model.")
