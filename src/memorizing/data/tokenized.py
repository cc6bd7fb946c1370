"""Documents as token ids: tokenized once, kept on disk by content, cut where a recipe says so."""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from memorizing.data.text import Document
from memorizing.data.tokenizer import Tokenizer
from memorizing.errors import CorpusError
from memorizing.storage.files import read_bytes, write_bytes

_FORMAT = "memorizing tokens 1"
CACHE_VARIABLE = "MEMORIZING_CACHE"


def find_cache_dir() -> Path:
    """`MEMORIZING_CACHE`, or `~/.cache/memorizing`."""
    return Path(os.environ.get(CACHE_VARIABLE) or Path("~/.cache/memorizing")).expanduser()


class TokenCache:
    """A folder of files, one per text and tokenizer, each an .npz with a checksum.

    Ids are uint16 where they fit, else uint32. A file that is truncated or altered counts as absent
    and is written anew. The folder may be deleted at any time.
    """

    def __init__(self, folder: str | Path | None = None) -> None:
        """Use `folder`, or the default one."""
        self.folder = (Path(folder) if folder is not None else find_cache_dir()) / "tokens"

    def locate(self, text: str, fingerprint: str) -> Path:
        """Where the tokens of a text are kept, by the SHA-256 of format, tokenizer and text."""
        digest = hashlib.sha256(f"{_FORMAT}\0{fingerprint}\0".encode())
        digest.update(text.encode())
        name = digest.hexdigest()
        return self.folder / name[:2] / f"{name}.npz"

    def read(self, path: Path, vocab_size: int) -> np.ndarray | None:
        """Tokens (n,) int32, or None where they are absent, damaged or out of the vocabulary."""
        try:
            with np.load(io.BytesIO(read_bytes(path, most=2**34)), allow_pickle=False) as arrays:
                tokens = arrays["tokens"]
        except Exception:  # a damaged file raises whatever numpy, zipfile and its packers raise
            return None
        if (
            tokens.ndim != 1
            or tokens.dtype not in (np.uint16, np.uint32)
            or tokens.max(initial=0) >= vocab_size
        ):
            return None
        return tokens.astype(np.int32)

    def write(self, path: Path, tokens: np.ndarray) -> None:
        """Keep tokens.

        Raises:
            ResourceError: there is no space left, or the folder cannot be written.
        """
        small = tokens.max(initial=0) <= np.iinfo(np.uint16).max
        buffer = io.BytesIO()
        np.savez(buffer, tokens=tokens.astype(np.uint16 if small else np.uint32))
        write_bytes(path, buffer.getvalue())


# Texts tokenized in one call: enough for all threads, little enough for memory (a token takes some
# 200 bytes there).
_BATCH_BYTES = 8 * 2**20


@dataclass(frozen=True)
class TokenizedDocument:
    """A document as token ids."""

    name: str
    tokens: np.ndarray
    """(n,) int32, without the start token."""
    num_bytes: int
    """Bytes of the raw text: what bits per byte are counted by."""


def tokenize_documents(
    documents: Iterable[Document],
    tokenizer: Tokenizer,
    cache_dir: str | Path | None = None,
    *,
    max_tokens: int = 0,
    min_tokens: int = 0,
    progress: Callable[[int], None] | None = None,
) -> list[TokenizedDocument]:
    """Tokenize documents, reading from and writing to the cache, then cut them (`cut_documents`).

    Args:
        documents: what to tokenize, in the order of the result.
        tokenizer: a changed tokenizer has other cache entries.
        cache_dir: by default `MEMORIZING_CACHE`, or `~/.cache/memorizing`.
        max_tokens: longer documents are cut; 0 leaves them whole.
        min_tokens: shorter documents are left out.
        progress: called with the number of bytes that were done since the last call.

    Raises:
        CorpusError: every document is shorter than `min_tokens`.
        ResourceError: the cache cannot be written.
    """
    cache = TokenCache(cache_dir)
    found: list[TokenizedDocument] = []
    for batch in batch_documents(documents):
        paths = [cache.locate(document.text, tokenizer.fingerprint) for document in batch]
        known = [cache.read(path, tokenizer.vocab_size) for path in paths]
        missing = [i for i, tokens in enumerate(known) if tokens is None]
        encoded = tokenizer.encode_batch([batch[i].text for i in missing])
        for i, tokens in zip(missing, encoded, strict=True):
            cache.write(paths[i], tokens)
            known[i] = tokens
        found += [
            TokenizedDocument(document.name, tokens, document.num_bytes)
            for document, tokens in zip(batch, known, strict=True)
            if tokens is not None
        ]
        if progress:
            progress(sum(document.num_bytes for document in batch))
    return cut_documents(found, tokenizer, max_tokens, min_tokens)


def batch_documents(documents: Iterable[Document]) -> Iterator[list[Document]]:
    """As many documents at a time as are tokenized in one call."""
    batch: list[Document] = []
    num_bytes = 0
    for document in documents:
        batch.append(document)
        num_bytes += document.num_bytes
        if num_bytes >= _BATCH_BYTES:
            yield batch
            batch, num_bytes = [], 0
    if batch:
        yield batch


def cut_documents(
    documents: Sequence[TokenizedDocument],
    tokenizer: Tokenizer,
    max_tokens: int = 0,
    min_tokens: int = 0,
) -> list[TokenizedDocument]:
    """Cut documents at `max_tokens`, then leave out those shorter than `min_tokens`.

    The pieces of `name` are `name`, `name#2`, `name#3`, ... and their bytes sum to the document's.
    A piece has the bytes its tokens stand for; where they do not add up to the raw text (bytes that
    were replaced, a tokenizer that normalizes) they are scaled, cut point by cut point.

    Raises:
        CorpusError: nothing is left.
    """
    pieces = [piece for document in documents for piece in _cut(document, tokenizer, max_tokens)]
    kept = [piece for piece in pieces if len(piece.tokens) >= max(min_tokens, 1)]
    if pieces and not kept:
        longest = max(len(piece.tokens) for piece in pieces)
        raise CorpusError(
            f"data.min_document_tokens is {min_tokens}, but the longest document has {longest} "
            "tokens; lower it"
        )
    return kept


def take_beginnings(
    documents: Sequence[TokenizedDocument], tokenizer: Tokenizer, max_tokens: int
) -> list[TokenizedDocument]:
    """The first `max_tokens` tokens of each document (0: all), with the bytes they stand for."""
    return [_cut(document, tokenizer, max_tokens)[0] for document in documents]


def _cut(
    document: TokenizedDocument, tokenizer: Tokenizer, max_tokens: int
) -> list[TokenizedDocument]:
    num_tokens = len(document.tokens)
    if not max_tokens or num_tokens <= max_tokens:
        return [document]
    begins = np.arange(0, num_tokens, max_tokens)
    sums = np.concatenate([[0], tokenizer.token_bytes[document.tokens].cumsum(dtype=np.int64)])
    ends = sums[np.append(begins[1:], num_tokens)]
    # Integers throughout: the last end is num_bytes exactly, and all are exact where sums[-1] ==
    # num_bytes.
    ends = ends * document.num_bytes // max(int(sums[-1]), 1)
    sizes = np.diff(ends, prepend=0)
    return [
        TokenizedDocument(
            document.name if i == 0 else f"{document.name}#{i + 1}",
            document.tokens[begin : begin + max_tokens],
            int(size),
        )
        for i, (begin, size) in enumerate(zip(begins, sizes, strict=True))
    ]
