"""Where a session keeps what was read: in a folder, or only as long as it lives."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from memorizing.errors import MemoryFolderError
from memorizing.huggingface.attaching.memory_layer import OpenHeads
from memorizing.huggingface.attaching.memory_settings import MemorySettings
from memorizing.huggingface.attaching.passage_room import Library
from memorizing.huggingface.sessions.library import ReadStored, open_library, take_tokenizer
from memorizing.index_settings import IndexSettings
from memorizing.memory.disk import (
    FolderDescription,
    LayerEntries,
    MemoryFolder,
    NewDocument,
    StoredDocument,
)
from memorizing.memory.frozen import FrozenMemory
from memorizing.settings import find_nearest


class RamStore:
    """What was read, in tensors; as `FolderStore` in all else."""

    left_out: Mapping[int, int] = MappingProxyType({})
    """See `FolderStore`."""

    def __init__(self, description: FolderDescription, index: IndexSettings) -> None:
        """Empty, of entries so described."""
        self.description = description
        self.index = index
        self.documents: tuple[StoredDocument, ...] = ()
        """What was read, oldest first; the segment has no file."""
        self._given: dict[str, NewDocument] = {}
        self._entries: dict[int, tuple[Tensor, Tensor]] = {}

    def find_document(self, name: str) -> NewDocument | None:
        """The document of a name."""
        return self._given.get(name)

    def has_text(self, document: StoredDocument) -> bool:
        """See `FolderStore`."""
        return self._given[document.name].text is not None

    def read_text(self, name: str) -> str:
        """See `FolderStore`."""
        text = self._given[name].text
        assert text is not None
        return text

    def read_spans(self, name: str) -> Tensor | None:
        """See `FolderStore`."""
        document = self._given.get(name)
        offsets = None if document is None else document.token_offsets
        return None if offsets is None else torch.as_tensor(offsets)

    def list_places(self, document: StoredDocument) -> Tensor:
        """See `FolderStore`."""
        return torch.as_tensor(self._given[document.name].entry_tokens)

    def open_layers(
        self, devices: Mapping[int, torch.device], open_heads: Mapping[int, OpenHeads]
    ) -> dict[int, FrozenMemory]:
        """See `FolderStore`."""
        return {
            layer: FrozenMemory.from_tensors(
                keys.to(devices[layer]),
                values.to(devices[layer]),
                self.index,
                heads=open_heads[layer].key_heads,
            )
            for layer, (keys, values) in self._entries.items()
            if keys.shape[1] and layer in open_heads and open_heads[layer].is_any
        }

    def open_library(self, settings: MemorySettings, tokenizer: Any) -> Library | None:
        """See `FolderStore`."""
        return open_library(self, settings, tokenizer)

    def open_entries(self) -> ReadStored:
        """See `FolderStore`."""
        kept = dict(self._entries)

        def read(
            document: StoredDocument, numbers: Tensor
        ) -> Iterator[tuple[int, tuple[Tensor, Tensor]]]:
            places = numbers + document.first_entry
            for layer, (keys, values) in kept.items():
                yield layer, (keys[:, places], values[:, places])

        return read

    @contextlib.contextmanager
    def write(self, tokenizer: Any) -> Iterator[None]:
        """See `FolderStore`; nobody else can write."""
        self.description = take_tokenizer(self.description, tokenizer)
        yield

    def append(self, documents: Sequence[NewDocument], entries: LayerEntries) -> None:
        """See `FolderStore`."""
        for document in documents:
            if document.name in self._given:
                self.forget(document.name)
        self._given |= {document.name: document for document in documents}
        for layer, new in entries.items():
            before = self._entries.get(layer)
            self._entries[layer] = (
                (new[0], new[1])
                if before is None
                else (torch.cat([before[0], new[0]], 1), torch.cat([before[1], new[1]], 1))
            )
        self._number()

    def forget(self, name: str) -> None:
        """See `FolderStore`."""
        document = next((one for one in self.documents if one.name == name), None)
        if document is None:
            raise MemoryFolderError(
                f"no document {name!r} was read, so it cannot be forgotten; there are "
                f"{len(self.documents)}: see memory.documents"
            )
        span = document.entries
        self._entries = {
            layer: (_cut_out(keys, span), _cut_out(values, span))
            for layer, (keys, values) in self._entries.items()
        }
        del self._given[name]
        self._number()

    def _number(self) -> None:
        documents, first = [], 0
        for one in self._given.values():
            documents.append(
                StoredDocument(one.name, one.num_tokens, one.num_entries, one.sha256, "", first)
            )
            first += one.num_entries
        self.documents = tuple(documents)

    def save(self, path: Path, dtype: str | None) -> None:
        """See `FolderStore`."""
        if not self.documents:
            raise MemoryFolderError("nothing was read, so there is nothing to save; read first")
        description = replace(self.description, dtype=dtype or self.description.dtype)
        MemoryFolder.create(path, description).append([*self._given.values()], self._entries)


class FolderStore:
    """What was read, in a folder, which is made when something is."""

    left_out: Mapping[int, int] = MappingProxyType({})
    """Parts that did not answer; nothing of a folder is left out."""

    def __init__(
        self,
        path: Path,
        folder: MemoryFolder | None,
        description: FolderDescription,
        index: IndexSettings,
        chosen: Sequence[StoredDocument] | None = None,
    ) -> None:
        """Take a folder that is there, or its place.

        Args:
            path: of the folder.
            folder: opened, where it is there.
            description: of new entries. Where the folder's fingerprint is of an older format, that
                of the description replaces it at the next `write`.
            index: what searches the entries.
            chosen: documents that are searched. Nothing is written then. None is all.
        """
        self.path = path
        self.index = index
        self._folder = folder
        self._mine = description
        self._chosen = None if chosen is None else tuple(chosen)

    @property
    def description(self) -> FolderDescription:
        """What all entries have in common."""
        return self._folder.description if self._folder else self._mine

    @property
    def documents(self) -> tuple[StoredDocument, ...]:
        """What was read, oldest first; where some were chosen, these."""
        if self._chosen is not None:
            return self._chosen
        return self._folder.documents if self._folder else ()

    def _check_unchosen(self) -> None:
        """Refuse to change or copy a memory that is open in part."""
        if self._chosen is not None and self._folder is not None:
            raise MemoryFolderError(
                f"{self.path} is open to search {len(self._chosen):,} of its "
                f"{len(self._folder.documents):,} documents, and not to be changed or copied; "
                "open it without documents to do this"
            )

    def find_document(self, name: str) -> StoredDocument | None:
        """The document of a name."""
        return self._folder.contents.find_document(name) if self._folder else None

    def has_text(self, document: StoredDocument) -> bool:
        """Whether the text of a document was kept."""
        return document.text is not None

    def read_text(self, name: str) -> str:
        """The kept text of a document.

        Raises:
            MemoryFolderError: it was not kept, or a file of the folder is damaged.
        """
        assert self._folder is not None
        return self._folder.contents.read_text(name)

    def list_places(self, document: StoredDocument) -> Tensor:
        """(num_entries,) int64: the token of every entry of a document.

        Raises:
            MemoryFolderError: a file of the folder is damaged.
        """
        assert self._folder is not None
        contents, first = self._folder.contents, 0
        for other in contents.documents:
            if other.name == document.name:
                break
            first += other.num_entries
        places = contents.token_of(torch.arange(first, first + document.num_entries))
        if len(places) and not 0 <= int(places.min()) <= int(places.max()) < document.num_tokens:
            raise MemoryFolderError(
                f"{self.path} has entries of tokens that {document.name!r} does not have; "
                "use another copy of the memory, or read the text again"
            )
        return places

    def read_spans(self, name: str) -> Tensor | None:
        """(num_tokens, 2): characters [start, end) of a document's tokens; None is not there.

        Raises:
            MemoryFolderError: a file of the folder is damaged.
        """
        assert self._folder is not None
        document = self.find_document(name)
        return None if document is None else self._folder.contents.read_spans(document)

    def open_layers(
        self, devices: Mapping[int, torch.device], open_heads: Mapping[int, OpenHeads]
    ) -> dict[int, FrozenMemory]:
        """Per layer that a head reads, the entries of its `key_heads`, searched on its device."""
        if self._folder is None:
            return {}
        chosen = {document.name for document in self.documents}
        forgotten = {one.name for one in self._folder.documents if one.name not in chosen}
        return {
            layer: self._folder.open_layer(
                layer,
                devices[layer],
                self.index,
                heads=open_heads[layer].key_heads,
                forgotten=forgotten,
            )
            for layer in self.description.layers
            if layer in open_heads and open_heads[layer].is_any
        }

    def open_library(self, settings: MemorySettings, tokenizer: Any) -> Library | None:
        """What is read of the documents where passages are; see `open_library`."""
        return open_library(self, settings, tokenizer)

    def open_entries(self) -> ReadStored:
        """What reads single entries of all layers, of the documents that are there now."""
        return _read_nothing if self._folder is None else self._folder.contents.read_entries

    @contextlib.contextmanager
    def write(self, tokenizer: Any) -> Iterator[None]:
        """Be the only one that writes what a tokenizer made of texts.

        Raises:
            MemoryFolderError: documents were read with another tokenizer, or some were chosen.
        """
        self._check_unchosen()
        described = take_tokenizer(self.description, tokenizer)
        if self._folder is None:
            self._folder = MemoryFolder.create(self.path, described)
        with self._folder.lock():
            if "fingerprint" not in self.description.settings:
                fingerprint = self._mine.settings["fingerprint"]
                self._folder.describe(
                    self._mine.fingerprint, {**described.settings, "fingerprint": fingerprint}
                )
            yield

    def append(self, documents: Sequence[NewDocument], entries: LayerEntries) -> None:
        """Add documents, in the place of those of the same names."""
        assert self._folder is not None
        replaced = {document.name for document in documents}
        self._folder.append(documents, entries, replaced=replaced)

    def take_over(self, path: Path) -> tuple[StoredDocument, ...]:
        """Move what was read into another folder here; see `MemoryFolder.take_over`."""
        assert self._folder is not None
        return self._folder.take_over(path)

    def forget(self, name: str) -> None:
        """Remove a document.

        Raises:
            MemoryFolderError: there is none of this name, or some were chosen.
        """
        self._check_unchosen()
        if self._folder is None:
            raise MemoryFolderError(f"{self.path} holds no document {name!r}: nothing was read yet")
        self._folder.forget(name)

    def save(self, path: Path, dtype: str | None) -> None:
        """Write everything into a new folder.

        Raises:
            MemoryFolderError: nothing was read, a dtype that the entries do not have any more, or
                documents were chosen.
        """
        self._check_unchosen()
        if dtype is not None and dtype != self.description.dtype:
            raise MemoryFolderError(
                f"{self.path} is stored in {self.description.dtype}, and a copy of it cannot be in "
                f"{dtype}; read the text again with open_memory(model, dtype={dtype!r})"
            )
        if self._folder is None:
            raise MemoryFolderError("nothing was read, so there is nothing to save; read first")
        MemoryFolder.merge([self.path], path)


def choose_documents(
    documents: Sequence[StoredDocument], patterns: Sequence[str], path: object
) -> tuple[StoredDocument, ...]:
    """Documents that a pattern matches, in their order.

    A pattern is a name, or one of `fnmatch` for whole names, in which case counts: `*` is any
    characters, slashes too, `?` is one, `[ab]` one of these.

    Raises:
        MemoryFolderError: a pattern that matches none, with names that are near.
    """
    names = [document.name for document in documents]
    chosen: set[str] = set()
    for pattern in patterns:
        found = [name for name in names if name == pattern or fnmatchcase(name, pattern)]
        if not found:
            inside = f"{pattern.rstrip('/')}/"
            is_folder = any(name.startswith(inside) for name in names)
            hint = f"write '{inside}*' for all of a folder" if is_folder else ""
            raise MemoryFolderError(
                f"{pattern!r} matches none of the {len(names):,} documents of {path}; "
                f"{hint or find_nearest(pattern, names)}"
            )
        chosen.update(found)
    return tuple(document for document in documents if document.name in chosen)


def _read_nothing(document: StoredDocument, numbers: Tensor) -> Iterator[Any]:
    """Of a folder that is not there yet."""
    return iter(())


def _cut_out(entries: Tensor, span: range) -> Tensor:
    return torch.cat([entries[:, : span.start], entries[:, span.stop :]], 1)
