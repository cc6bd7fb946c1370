"""Text to token ids and back, one class around any `tokenizers` tokenizer."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
import tokenizers

from memorizing.data.corpus import summarize_error
from memorizing.errors import TokenizerError
from memorizing.storage.files import write_bytes

START_TOKEN = "<|document|>"
TOKENIZER_FILE = "tokenizer.json"
# Runs of white space with a line break (so: line end and next indent), digits one by one, words
# with one leading mark or space, marks, other white space. No piece has white space after its first
# character unless all of it is.
PIECES = r"\s*[\r\n]\s*|\p{N}|[^\s\p{L}\p{N}]?\p{L}+| ?\p{L}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"

_KNOWN_START_TOKENS = (START_TOKEN, "<s>", "<bos>", "<|begin_of_text|>", "<|endoftext|>", "[CLS]")
_BYTE_TOKEN = re.compile(r"<0x[0-9A-F]{2}>")


class Tokenizer:
    """A tokenizer with a start token that precedes each document.

    Text is never read as a special token: a document that spells out `<|document|>` is text.
    Nothing is added at either end, truncated or padded.
    """

    def __init__(self, backend: tokenizers.Tokenizer) -> None:
        """Wrap a `tokenizers` tokenizer; a missing start token is added to it."""
        backend = tokenizers.Tokenizer.from_str(backend.to_str())
        backend.no_truncation()
        backend.no_padding()
        start = next(
            (token for token in _KNOWN_START_TOKENS if backend.token_to_id(token) is not None),
            START_TOKEN,
        )
        backend.add_special_tokens([start])
        backend.encode_special_tokens = True
        start_id = backend.token_to_id(start)
        assert start_id is not None
        self._backend = backend
        self.start_token: int = start_id
        """Id of the token before a document's first."""

    @property
    def backend(self) -> tokenizers.Tokenizer:
        """The `tokenizers` tokenizer itself."""
        return self._backend

    @cached_property
    def vocab_size(self) -> int:
        """Number of ids a model needs: the largest id plus 1."""
        return 1 + max(self._backend.get_vocab(with_added_tokens=True).values())

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of the tokenizer as canonical JSON, whatever the layout of its file."""
        canonical = json.dumps(
            json.loads(self._backend.to_str()), sort_keys=True, separators=(",", ":")
        )
        return hashlib.sha256(canonical.encode()).hexdigest()

    def encode(self, text: str) -> np.ndarray:
        """Token ids of a text, (n,) int32, without the start token."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Token ids of several texts, in parallel threads where the machine has them."""
        encodings = self._backend.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.array(encoding.ids, dtype=np.int32) for encoding in encodings]

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """Text of ids, special tokens included; bytes that are no whole character become U+FFFD."""
        return self._backend.decode([int(i) for i in ids], skip_special_tokens=False)

    @cached_property
    def token_bytes(self) -> np.ndarray:
        """Bytes of text that each id stands for, (vocab_size,) int32; 0 for special tokens.

        Exact for tokenizers that lose nothing (those that `train_tokenizer` makes, and GPT-2's
        kind); else close.
        """
        spec = json.loads(self._backend.to_str())
        decoder = json.dumps(spec.get("decoder"), ensure_ascii=False)
        byte_level = '"ByteLevel"' in decoder
        space = "\u2581" if "\u2581" in decoder else ""
        prefix = "##" if '"WordPiece"' in decoder else ""
        sizes = np.zeros(self.vocab_size, dtype=np.int32)
        for token, index in self._backend.get_vocab(with_added_tokens=True).items():
            if byte_level:
                sizes[index] = len(token)
            elif _BYTE_TOKEN.fullmatch(token):
                sizes[index] = 1
            else:
                shown = token.replace(space, " ") if space else token
                sizes[index] = len(shown.removeprefix(prefix).encode("utf-8", errors="replace"))
        for added in spec["added_tokens"]:
            sizes[added["id"]] = 0 if added["special"] else len(added["content"].encode())
        return sizes

    def save(self, folder: str | Path) -> Path:
        """Write `tokenizer.json` into a folder, made where it is missing, and return its path.

        Raises:
            ResourceError: there is no space left, or the folder cannot be written.
        """
        path = Path(folder) / TOKENIZER_FILE
        write_bytes(path, self._backend.to_str(pretty=True).encode())
        return path


def load_tokenizer(source: str | Path) -> Tokenizer:
    """A tokenizer by its file, a folder with `tokenizer.json`, or a name on the Hugging Face hub.

    Raises:
        TokenizerError: there is none, it is not a tokenizer, or the hub does not give it.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        path = path / TOKENIZER_FILE
        if not path.is_file():
            raise TokenizerError(
                f"folder {str(source)!r} holds no {TOKENIZER_FILE}; give a folder or file that "
                "was saved"
            )
    if path.is_file():
        try:
            return Tokenizer(tokenizers.Tokenizer.from_file(str(path)))
        except Exception as error:  # tokenizers raises bare Exception
            raise TokenizerError(
                f"{str(path)!r} is not a tokenizer, or is truncated ({summarize_error(error)}); "
                "train or save it again"
            ) from error
    if (
        str(source).endswith(".json")
        or str(source).startswith((".", "/", "~"))
        or str(source).count(os.sep) > 1
    ):
        raise TokenizerError(
            f"tokenizer file {str(source)!r} does not exist; give an existing path or a name on "
            "the hub"
        )
    try:
        return Tokenizer(tokenizers.Tokenizer.from_pretrained(str(source)))
    except Exception as error:
        reason = summarize_error(error)
        raise TokenizerError(
            f"no tokenizer {str(source)!r} here or on the Hugging Face hub ({reason}); give a "
            "path or an existing name"
        ) from error
