"""Texts as a tokenizer of `transformers` reads them, without special tokens."""

from __future__ import annotations

from typing import Any

import numpy as np

from memorizing.data import Tokenizer


def wrap_tokenizer(tokenizer: Any) -> Tokenizer | None:
    """A tokenizer of `transformers` as one of ours; None where it has no backend of `tokenizers`.

    It never reads text as a special token, and adds none.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    return None if backend is None else Tokenizer(backend)


def encode_text(tokenizer: Any, text: str) -> np.ndarray:
    """Token ids (n,) of a text, by a tokenizer of `transformers`."""
    own = wrap_tokenizer(tokenizer)
    if own is not None:
        return own.encode(text)
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return np.array(ids, dtype=np.int32)
