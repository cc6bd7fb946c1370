"""Documents as the caller gives them, checked against one another and turned into a part."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from memorizing.errors import MemoryFolderError
from memorizing.memory.disk.contents import Contents
from memorizing.memory.disk.manifest import FolderDescription, StoredDocument, is_hash
from memorizing.memory.disk.segment import Part, encode_layer, number_documents

LayerEntries = Mapping[int, tuple[Tensor, Tensor]]
"""Layer -> keys and values (H, n, D), oldest first."""

_MOST_INT32 = 2**31 - 1


@dataclass(frozen=True)
class NewDocument:
    """A document that was read.

    Raises:
        MemoryFolderError: values that do not fit one another.
    """

    name: str
    num_tokens: int
    num_entries: int
    """Of its tokens, how many have an entry."""
    sha256: str
    """Of its text; see `hash_text`."""
    text: str | None = None
    """Given, it is kept in the folder."""
    token_offsets: Sequence[tuple[int, int]] | Tensor | None = None
    """(num_tokens, 2): first character of each token and the one after its last; only with text."""
    entry_tokens: Sequence[int] | Tensor | None = None
    """(num_entries,): the token of each entry, ascending; None is the first ones."""

    def __post_init__(self) -> None:
        """Refuse values that do not fit one another."""
        what = f"the document {self.name!r}"
        if not self.name or not 0 <= self.num_entries <= self.num_tokens <= _MOST_INT32:
            raise MemoryFolderError(
                f"{what} has {self.num_tokens} tokens and {self.num_entries} entries; it needs a "
                "name, and at most one entry for each token"
            )
        expected = "64 hexadecimal digits" if self.text is None else hash_text(self.text)
        if self.sha256 != expected and (self.text is not None or not is_hash(self.sha256)):
            raise MemoryFolderError(
                f"{what} has the hash {self.sha256!r}, and its text has {expected}; use "
                "hash_text(text)"
            )
        if self.token_offsets is not None and self.text is None:
            raise MemoryFolderError(f"{what} has offsets of tokens, but no text; give both or none")
        _check_numbers(
            f"entry_tokens of {what}", self.entry_tokens, (self.num_entries,), self.num_tokens - 1
        )
        if self.entry_tokens is not None:
            tokens = torch.as_tensor(self.entry_tokens)
            if not bool((tokens[1:] > tokens[:-1]).all()):
                raise MemoryFolderError(f"entry_tokens of {what} do not ascend")
        _check_numbers(
            f"token_offsets of {what}",
            self.token_offsets,
            (self.num_tokens, 2),
            min(len(self.text or ""), _MOST_INT32),
        )


def _check_numbers(
    what: str, values: Sequence[Any] | Tensor | None, shape: tuple[int, ...], most: int
) -> None:
    """Refuse numbers of another shape, or that are not between 0 and `most`."""
    if values is None:
        return
    given = torch.as_tensor(values)
    if tuple(given.shape) != shape and (given.numel() or 0 not in shape):
        raise MemoryFolderError(f"{what} are {tuple(given.shape)}; they must be {shape}")
    if given.numel() and (
        given.is_floating_point() or int(given.min()) < 0 or int(given.max()) > most
    ):
        raise MemoryFolderError(f"{what} are {given.dtype}, and not all whole from 0 to {most}")


def hash_text(text: str) -> str:
    """SHA-256 of a text in UTF-8 (lone surrogates as such)."""
    return hashlib.sha256(_encode(text)).hexdigest()


def check_new(
    contents: Contents, documents: Sequence[NewDocument], replaced: Collection[str]
) -> None:
    """Refuse names that are in a folder already and are not replaced, or twice among the new.

    Raises:
        MemoryFolderError: such a name, and what to do.
    """
    names: set[str] = set()
    for document in documents:
        there = contents.find_document(document.name)
        if document.name in names:
            raise MemoryFolderError(
                f"two of the documents are named {document.name!r}; give every one its own name"
            )
        if there is not None and document.name not in replaced:
            same = there.sha256 == document.sha256
            raise MemoryFolderError(
                f"{contents.folder} holds the document {document.name!r} already, with "
                f"{'the same' if same else 'another'} text; "
                f"{'leave it out' if same else 'forget it first, or give another name'}"
            )
        names.add(document.name)


def make_part(
    description: FolderDescription, documents: Sequence[NewDocument], entries: LayerEntries
) -> Part:
    """What was read as a part of a segment.

    Args:
        description: of the folder.
        documents: in the order of their entries.
        entries: of all documents together.

    Raises:
        MemoryFolderError: entries of other layers or shapes, or that are not finite.
    """
    _check_entries(description, sum(document.num_entries for document in documents), entries)
    tensors: dict[str, Tensor] = {}
    for layer in description.layers:
        tensors |= encode_layer(description, layer, *entries[layer])
    texts = [None if one.text is None else _encode(one.text) for one in documents]
    tokens, spans = [torch.empty(0, dtype=torch.int32)], [torch.empty(0, 2, dtype=torch.int32)]
    stored = []
    for document, text in zip(documents, texts, strict=True):
        of_entries = document.entry_tokens
        if of_entries is None:
            of_entries = torch.arange(document.num_entries)
        tokens.append(torch.as_tensor(of_entries).to(torch.int32))
        if document.token_offsets is not None:
            spans.append(torch.as_tensor(document.token_offsets).to(torch.int32).view(-1, 2))
        lengths = (
            None if text is None else (0, len(text)),
            None if document.token_offsets is None else (0, document.num_tokens),
        )
        known = (document.name, document.num_tokens, document.num_entries, document.sha256)
        stored.append(StoredDocument(*known, "", 0, *lengths))
    tensors["tokens"], tensors["token_spans"] = torch.cat(tokens), torch.cat(spans)
    content = bytearray(b"".join(text for text in texts if text) or b" ")
    tensors["texts"] = torch.frombuffer(content, dtype=torch.uint8)
    _, numbered = number_documents([Part(tuple(stored), tensors.__getitem__)], "")
    return Part(numbered, tensors.__getitem__)


def _check_entries(description: FolderDescription, num_entries: int, entries: LayerEntries) -> None:
    if sorted(entries) != list(description.layers):
        raise MemoryFolderError(
            f"entries of layers {sorted(entries)} were given; this memory has the layers "
            f"{list(description.layers)}"
        )
    shape = (description.num_heads, num_entries, description.head_dim)
    for layer, (keys, values) in entries.items():
        if tuple(keys.shape) != shape or tuple(values.shape) != shape:
            raise MemoryFolderError(
                f"keys of layer {layer} are {tuple(keys.shape)} and values "
                f"{tuple(values.shape)}; the documents have {num_entries} entries together, so "
                f"both must be {shape} (heads, entries, head_dim)"
            )


def _encode(text: str) -> bytes:
    return text.encode("utf-8", errors="surrogatepass")
