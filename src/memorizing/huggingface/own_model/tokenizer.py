"""The tokenizer of our own model for `AutoTokenizer`: a start token precedes every text."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers.processors import PostProcessor
from transformers import PreTrainedTokenizerFast

from memorizing.data import Tokenizer

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
        """
        if tokenizer_object is None:
            tokenizer_object = tokenizers.Tokenizer.from_file(os.fspath(tokenizer_file or ""))
        own = Tokenizer(tokenizer_object)
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
