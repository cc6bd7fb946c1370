"""Configuration and tokenizer of our own model, as `transformers` reads and writes them."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any, ClassVar

import tokenizers
from tokenizers.processors import PostProcessor
from transformers import PreTrainedConfig, PreTrainedTokenizerFast

from memorizing.config import ModelConfig
from memorizing.data import Tokenizer
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


TOKENIZER_FILE = "tokenizer.json"


class MemorizingTokenizer(PreTrainedTokenizerFast):
    """The `tokenizer.json` of a checkpoint, read as our training reads it.

    The start token, `bos_token`, is put before every text, because a document begins with it; for
    text that goes on, give `add_special_tokens=False`. Text is never read as a special token.
    Batches are padded on the left, with the start token where no other is set: the mask tells which
    it is. Saved again, `tokenizer.json` is the same, so that our `load_model` knows it.
    """

    model_input_names = ["input_ids", "attention_mask"]
    padding_side = "left"

    def __init__(
        self,
        tokenizer_file: str | os.PathLike[str] | None = None,
        tokenizer_object: tokenizers.Tokenizer | None = None,
        **kwargs: Any,
    ) -> None:
        """Read a file, or take a tokenizer of `tokenizers`.

        Args:
            tokenizer_file: a `tokenizer.json`.
            tokenizer_object: instead of the file.
            kwargs: as `PreTrainedTokenizerFast` takes them.

        Raises:
            TokenizerError: the file is missing or damaged.
        """
        own = (
            Tokenizer(tokenizer_object)
            if tokenizer_object is not None
            else Tokenizer.read(Path(tokenizer_file or ""))
        )
        start = own.backend.id_to_token(own.start_token)
        self._own_post_processor: PostProcessor | None = own.backend.post_processor
        kwargs |= {"bos_token": start, "add_bos_token": True}
        kwargs = {
            "pad_token": start,
            "padding_side": "left",
            "split_special_tokens": True,
            "clean_up_tokenization_spaces": False,
            **kwargs,
        }
        super().__init__(tokenizer_object=own.backend, **kwargs)

    @classmethod
    def convert_to_native_format(cls, **kwargs: Any) -> dict[str, Any]:
        """The arguments as they are: `__init__` reads the file itself."""
        kwargs.pop("trust_remote_code", None)
        return kwargs

    def _save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        file_names: tuple[str, ...],
        legacy_format: bool | None = None,
        filename_prefix: str | None = None,
    ) -> tuple[str, ...]:
        plain = tokenizers.Tokenizer.from_str(self.backend_tokenizer.to_str())
        plain.no_truncation()
        plain.no_padding()
        plain.post_processor = self._own_post_processor  # type: ignore[assignment]
        prefix = f"{filename_prefix}-" if filename_prefix else ""
        path = Path(save_directory) / f"{prefix}{TOKENIZER_FILE}"
        path.write_text(plain.to_str(pretty=True), encoding="utf-8")
        return (*file_names, str(path))
