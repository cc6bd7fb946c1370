"""Where a session keeps what was read: in a folder, or only as long as it lives."""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from memorizing.errors import MemoryFolderError
from memorizing.huggingface.attaching.open_heads import OpenHeads
from memorizing.index_settings import parse_index
from memorizing.memory.disk import (
    FolderDescription,
    LayerEntries,
    MemoryFolder,
    NewDocument,
    StoredDocument,
)
from memorizing.memory.frozen import FrozenMemory


class Store(ABC):
    """Documents and their entries."""

    def __init__(self, description: FolderDescription, index: str) -> None:
        """Take what the entries have in common, and what searches them."""
        self.description = description
        self.index = parse_index(index)

    @property
    @abstractmethod
    def documents(self) -> tuple[StoredDocument, ...]:
        """What was read, oldest first."""

    @abstractmethod
    def find_document(self, name: str) -> StoredDocument | None:
        """The document of a name."""

    @abstractmethod
    def number_documents(self, entries: Tensor) -> Tensor:
        """For numbers of entries (n,), the places of their documents in `documents`."""

    @abstractmethod
    def open_layers(
        self, devices: Mapping[int, torch.device], open_heads: Mapping[int, OpenHeads]
    ) -> dict[int, FrozenMemory]:
        """Per layer that a head reads, the entries of its `key_heads`, searched on its device."""

    @abstractmethod
    def check_tokenizer(self, tokenizer_hash: str) -> None:
        """Refuse another tokenizer than before.

        Raises:
            MemoryFolderError: documents were read with another one.
        """

    @abstractmethod
    def write(self) -> AbstractContextManager[object]:
        """Be the only one that writes."""

    @abstractmethod
    def append(self, documents: Sequence[NewDocument], entries: LayerEntries) -> None:
        """Add documents."""

    @abstractmethod
    def forget(self, name: str) -> None:
        """Remove a document."""

    @abstractmethod
    def save(self, path: Path, dtype: str | None) -> None:
        """Write everything into a new folder."""


class RamStore(Store):
    """What was read, in tensors."""

    def __init__(self, description: FolderDescription, index: str) -> None:
        """Empty."""
        super().__init__(description, index)
        self._given: list[NewDocument] = []
        self._documents: tuple[StoredDocument, ...] = ()
        self._by_name: dict[str, StoredDocument] = {}
        self._ends = torch.zeros(0, dtype=torch.int64)
        self._entries: dict[int, tuple[Tensor, Tensor]] = {}
        self._tokenizer: str | None = None

    @property
    def documents(self) -> tuple[StoredDocument, ...]:
        """As `Store.documents`; their segment has no file."""
        return self._documents

    def _list_documents(self) -> None:
        """Take over what is among the given ones now."""
        self._ends = torch.tensor([one.num_entries for one in self._given]).cumsum(0)
        self._documents = tuple(
            StoredDocument(
                one.name, one.num_tokens, one.num_entries, one.sha256, "", end - one.num_entries
            )
            for one, end in zip(self._given, self._ends.tolist(), strict=True)
        )
        self._by_name = {one.name: one for one in self._documents}

    def find_document(self, name: str) -> StoredDocument | None:
        """As `Store.find_document`."""
        return self._by_name.get(name)

    def number_documents(self, entries: Tensor) -> Tensor:
        """As `Store.number_documents`."""
        return torch.searchsorted(self._ends, entries.cpu(), right=True)

    def open_layers(
        self, devices: Mapping[int, torch.device], open_heads: Mapping[int, OpenHeads]
    ) -> dict[int, FrozenMemory]:
        """As `Store.open_layers`."""
        return {
            layer: FrozenMemory.from_tensors(
                keys.to(devices[layer]),
                values.to(devices[layer]),
                self.index,
                heads=open_heads[layer].key_heads,
            )
            for layer, (keys, values) in self._entries.items()
            if keys.shape[1] and open_heads[layer].is_any
        }

    def check_tokenizer(self, tokenizer_hash: str) -> None:
        """As `Store.check_tokenizer`."""
        _compare_tokenizers(self._tokenizer, tokenizer_hash)
        self._tokenizer = tokenizer_hash

    def write(self) -> AbstractContextManager[object]:
        """Nobody else can."""
        return contextlib.nullcontext()

    def append(self, documents: Sequence[NewDocument], entries: LayerEntries) -> None:
        """As `Store.append`."""
        self._given += documents
        self._list_documents()
        for layer, new in entries.items():
            before = self._entries.get(layer)
            self._entries[layer] = (
                (new[0], new[1])
                if before is None
                else (torch.cat([before[0], new[0]], 1), torch.cat([before[1], new[1]], 1))
            )

    def forget(self, name: str) -> None:
        """As `Store.forget`."""
        document = self.find_document(name)
        if document is None:
            raise MemoryFolderError(
                f"no document {name!r} was read, so it cannot be forgotten; there are "
                f"{len(self._documents)}: see memory.documents"
            )
        start, stop = document.first_entry, document.first_entry + document.num_entries
        self._given = [one for one in self._given if one.name != name]
        self._list_documents()
        self._entries = {
            layer: (_cut_out(keys, start, stop), _cut_out(values, start, stop))
            for layer, (keys, values) in self._entries.items()
        }

    def save(self, path: Path, dtype: str | None) -> None:
        """As `Store.save`."""
        if not self._given:
            raise MemoryFolderError("nothing was read, so there is nothing to save; read first")
        description = _add_tokenizer(self.description, self._tokenizer)
        description = replace(description, dtype=dtype or description.dtype)
        MemoryFolder.create(path, description).append(self._given, self._entries)


class FolderStore(Store):
    """What was read, in a folder, which is made when something is."""

    def __init__(
        self, path: Path, folder: MemoryFolder | None, description: FolderDescription, index: str
    ) -> None:
        """Take a folder that is there, or its place."""
        super().__init__(folder.description if folder else description, index)
        self.path = path
        self.folder = folder
        self._layers: dict[int, FrozenMemory] | None = None
        self._tokenizer: str | None = None

    @property
    def documents(self) -> tuple[StoredDocument, ...]:
        """As `Store.documents`."""
        return self.folder.documents if self.folder else ()

    def find_document(self, name: str) -> StoredDocument | None:
        """As `Store.find_document`."""
        return self.folder.contents.find_document(name) if self.folder else None

    def number_documents(self, entries: Tensor) -> Tensor:
        """As `Store.number_documents`."""
        assert self.folder is not None
        return self.folder.contents.document_of(entries.cpu())

    def open_layers(
        self, devices: Mapping[int, torch.device], open_heads: Mapping[int, OpenHeads]
    ) -> dict[int, FrozenMemory]:
        """As `Store.open_layers`."""
        if self.folder is None:
            return {}
        return {
            layer: self.folder.open_layer(
                layer, devices[layer], self.index, heads=open_heads[layer].key_heads
            )
            for layer in self.description.layers
            if open_heads[layer].is_any
        }

    def check_tokenizer(self, tokenizer_hash: str) -> None:
        """As `Store.check_tokenizer`."""
        _compare_tokenizers(self.description.settings.get("tokenizer"), tokenizer_hash)
        self._tokenizer = tokenizer_hash

    @contextlib.contextmanager
    def write(self) -> Iterator[object]:
        """As `Store.write`."""
        if self.folder is None:
            self.description = _add_tokenizer(self.description, self._tokenizer)
            self.folder = MemoryFolder.create(self.path, self.description)
        with self.folder.lock():
            yield self.folder

    def append(self, documents: Sequence[NewDocument], entries: LayerEntries) -> None:
        """As `Store.append`."""
        assert self.folder is not None
        self.folder.append(documents, entries)

    def forget(self, name: str) -> None:
        """As `Store.forget`."""
        if self.folder is None:
            raise MemoryFolderError(f"{self.path} holds no document {name!r}: nothing was read yet")
        self.folder.forget(name)

    def save(self, path: Path, dtype: str | None) -> None:
        """As `Store.save`."""
        if dtype is not None and dtype != self.description.dtype:
            raise MemoryFolderError(
                f"{self.path} is stored in {self.description.dtype}, and a copy of it cannot be in "
                f"{dtype}; read the text again with open_memory(model, dtype={dtype!r})"
            )
        if self.folder is None:
            raise MemoryFolderError("nothing was read, so there is nothing to save; read first")
        MemoryFolder.merge([self.path], path)


def _cut_out(entries: Tensor, start: int, stop: int) -> Tensor:
    return torch.cat([entries[:, :start], entries[:, stop:]], 1)


def _compare_tokenizers(before: str | None, now: str) -> None:
    if before is not None and before != now:
        raise MemoryFolderError(
            "this memory was read with another tokenizer; use the tokenizer of the model"
        )


def _add_tokenizer(description: FolderDescription, tokenizer: str | None) -> FolderDescription:
    return replace(description, settings={**description.settings, "tokenizer": tokenizer})
