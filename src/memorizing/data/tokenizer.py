"""Text to token ids and back, one class around any `tokenizers` tokenizer."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import os
import re
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers

from memorizing.data.text import clean_text, summarize_error
from memorizing.errors import MemorizingError, TokenizerError
from memorizing.storage.files import read_json, write_bytes

START_TOKEN = "<|document|>"
TOKENIZER_FILE = "tokenizer.json"
# Runs of white space with a line break (so: line end and next indent), digits one by one, words
# with one leading mark or space, marks, other white space. No piece has white space after its first
# character unless all of it is.
PIECES = r"\s*[\r\n]\s*|\p{N}|[^\s\p{L}\p{N}]?\p{L}+| ?\p{L}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"

_KNOWN_START_TOKENS = (START_TOKEN, "<s>", "<bos>", "<|begin_of_text|>", "<|endoftext|>", "[CLS]")
_BYTE_TOKEN = re.compile(r"<0x[0-9A-F]{2}>")
# `tokenizers` panics where a pattern steps back ten million times in one match, as PIECES and those
# of others do over white space. A run of it that is left whole is shorter than twice this.
_MAX_BLANKS = 4_000_000
# A table by id is allocated where a tokenizer is read; the largest published has a million ids.
_MAX_IDS = 2**24


class Tokenizer:
    """A tokenizer with a start token that precedes each document.

    Text is never read as a special token: a document that spells out `<|document|>` is text.
    Nothing is added at either end, truncated or padded.
    """

    def __init__(self, backend: tokenizers.Tokenizer) -> None:
        """Wrap a `tokenizers` tokenizer; a missing start token is added to it.

        Raises:
            TokenizerError: it contradicts itself.
        """
        with _explain_failures("the tokenizer is damaged", "train or save it again"):
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

    @classmethod
    def read(cls, path: Path) -> Tokenizer:
        """The tokenizer of a file, which somebody else may have written.

        Raises:
            TokenizerError: it is no plain file, no tokenizer, damaged, or has ids beyond 2^24: a
                table of so many entries would be made for them.
        """
        remedy = "train or save it again"
        spec = read_json(path, TokenizerError, remedy)
        largest = max(_list_ids(spec), default=0)
        if largest >= _MAX_IDS:
            raise TokenizerError(
                f"{str(path)!r} has a token of the id {largest:,}; allowed are ids below "
                f"{_MAX_IDS:,}: it is damaged, {remedy}"
            )
        with _explain_failures(f"{str(path)!r} is no tokenizer, or is damaged", remedy):
            # What was checked is what is read: of a key that stands twice the last counts.
            return cls(tokenizers.Tokenizer.from_str(json.dumps(spec)))

    @classmethod
    def parse(cls, text: str) -> Tokenizer:
        """The tokenizer that `backend.to_str()` described."""
        return cls(tokenizers.Tokenizer.from_str(text))

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
        """Token ids of several texts, in parallel threads where the machine has them.

        Surrogates that stand alone, which are no text, count as U+FFFD. Millions of blanks in a row
        are encoded in pieces.

        Raises:
            TokenizerError: the tokenizer cannot read one of the texts.
        """
        parts = [_split_blanks(clean_text(text)) for text in texts]
        with _explain_failures("the tokenizer cannot read a text", "leave it out"):
            encodings = iter(
                self._backend.encode_batch_fast(
                    list(itertools.chain.from_iterable(parts)), add_special_tokens=False
                )
            )
        return [
            np.concatenate([np.array(next(encodings).ids, dtype=np.int32) for _ in part])
            for part in parts
        ]

    def encode_with_ends(self, text: str) -> tuple[np.ndarray, np.ndarray]:
        """Ids (n,) int32 as `encode` gives them, and where the characters of each end, (n,) int64.

        A character that several tokens share ends with the first of them; what no token stands for
        belongs to the next one.

        Raises:
            TokenizerError: the tokenizer cannot read the text.
        """
        ids, ends, before = [], [], 0
        for part in _split_blanks(clean_text(text)):
            with _explain_failures("the tokenizer cannot read a text", "leave it out"):
                encoding = self._backend.encode(part, add_special_tokens=False)
            ids += encoding.ids
            ends += [before + end for _, end in encoding.offsets]
            before += len(part)
        return np.array(ids, dtype=np.int32), np.maximum.accumulate(np.array(ends, dtype=np.int64))

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
    if os.path.isdir(path):
        path = path / TOKENIZER_FILE
        if not os.path.lexists(path):
            raise TokenizerError(
                f"folder {str(source)!r} holds no {TOKENIZER_FILE}; give a folder or file that "
                "was saved"
            )
    if os.path.lexists(path):
        return Tokenizer.read(path)
    if (
        str(source).endswith(".json")
        or str(source).startswith((".", "/", "~"))
        or str(source).count(os.sep) > 1
    ):
        raise TokenizerError(
            f"tokenizer file {str(source)!r} does not exist; give an existing path or a name on "
            "the hub"
        )
    with _explain_failures(
        f"no tokenizer {str(source)!r} here or on the Hugging Face hub",
        "give a path or an existing name",
    ):
        return Tokenizer(tokenizers.Tokenizer.from_pretrained(str(source)))


def _list_ids(spec: dict[str, Any]) -> Iterator[int]:
    """What is an id in a `tokenizer.json`, whatever else it holds."""
    model = spec.get("model")
    vocab = model.get("vocab") if isinstance(model, dict) else None
    added = spec.get("added_tokens")
    found = [
        *(vocab.values() if isinstance(vocab, dict) else ()),
        *(
            item.get("id")
            for item in (added if isinstance(added, list) else ())
            if isinstance(item, dict)
        ),
    ]
    return (value for value in found if isinstance(value, int))


def _split_blanks(text: str) -> list[str]:
    """A text in pieces that `tokenizers` can read: cut before and after millions of blanks."""
    blocks = range(0, len(text) - _MAX_BLANKS + 1, _MAX_BLANKS)
    blank = [place for place in blocks if text[place : place + _MAX_BLANKS].isspace()]
    ends = sorted({0, len(text), *blank, *(place + _MAX_BLANKS for place in blank)})
    return [text[begin:end] for begin, end in itertools.pairwise(ends)] or [text]


@contextlib.contextmanager
def _explain_failures(what: str, remedy: str) -> Iterator[None]:
    """Turn what `tokenizers` and the hub raise, bare exceptions and panics, into one of ours."""
    try:
        yield
    except BaseException as error:
        if type(error).__name__ != "PanicException" and (
            not isinstance(error, Exception) or isinstance(error, (MemorizingError, MemoryError))
        ):
            raise
        raise TokenizerError(f"{what} ({summarize_error(error)}); {remedy}") from error
