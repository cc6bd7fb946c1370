"""The documents of a memory for passages: as tokens to read again, or as entries of all layers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from memorizing.errors import MemoryFolderError
from memorizing.huggingface.attaching.finding import Shelf
from memorizing.huggingface.attaching.memory_settings import MemorySettings
from memorizing.huggingface.attaching.passage_room import list_special_ids
from memorizing.huggingface.attaching.passages import Collection
from memorizing.huggingface.sessions.texts import encode_text, hash_tokenizer, is_same_tokenizer
from memorizing.memory.disk import FolderDescription, StoredDocument

ReadStored = Callable[[StoredDocument, Tensor], Iterator[tuple[int, tuple[Tensor, Tensor]]]]
"""Of some entries of a document, by their numbers (n,), keys and values (H, n, D) per layer."""


class TextStore(Protocol):
    """What a library needs of the store of a session; see `FolderStore`."""

    @property
    def description(self) -> FolderDescription:
        """What all entries have in common."""
        ...

    @property
    def documents(self) -> tuple[StoredDocument, ...]:
        """What was read."""
        ...

    def has_text(self, document: StoredDocument) -> bool:
        """Whether the text of a document was kept."""
        ...

    def read_text(self, name: str) -> str:
        """The kept text of a document."""
        ...

    def list_places(self, document: StoredDocument) -> Tensor:
        """(num_entries,) int64: the token of every entry of a document."""
        ...

    def open_entries(self) -> ReadStored:
        """What reads single entries of all layers."""
        ...


def open_library(
    store: TextStore, settings: MemorySettings, tokenizer: Any
) -> KeptEntries | KeptTexts | None:
    """The documents of a store for passages, as settings say; None where none are found.

    Raises:
        MemoryFolderError: texts are read again, and were not kept, or there is no tokenizer; or
            another tokenizer than theirs.
    """
    if settings.keep == "entries":
        return KeptEntries(store, tokenizer)
    return KeptTexts(store, tokenizer) if settings.finds_passages else None


class KeptTexts:
    """Texts that a store keeps, tokenized when a passage of them is read."""

    def __init__(self, store: TextStore, tokenizer: Any) -> None:
        """Take the documents that are there now.

        Raises:
            MemoryFolderError: one without its text; or no tokenizer, or another one than theirs.
        """
        self._store, self._tokenizer = store, tokenizer
        self._documents = store.documents
        self.names: Sequence[str] = [document.name for document in self._documents]
        self.num_entries: Sequence[int] = [one.num_entries for one in self._documents]
        self._tokens: dict[int, tuple[Tensor, Tensor]] = {}
        for document in self._documents:
            if not store.has_text(document):
                raise MemoryFolderError(
                    f"passages are read again, and this memory did not keep the text of "
                    f"{document.name!r}; forget it and read it again with `memorizing read "
                    "--keep-text`, or read entries (read='entries')"
                )
        if self._documents and tokenizer is None:
            raise MemoryFolderError(
                "passages are read again as tokens; call open_memory(..., tokenizer=tokenizer) "
                "with the tokenizer of the model"
            )
        if self._documents:
            take_tokenizer(store.description, tokenizer)
        self.special_ids = list_special_ids(tokenizer)

    def read_tokens(self, document: int) -> tuple[Tensor, Tensor]:
        """Of the entries of a document, their places (n,) in it and their ids (n,) int64.

        Raises:
            MemoryFolderError: its text became other tokens than were read.
        """
        if document not in self._tokens:
            found = self._documents[document]
            text, places = self._store.read_text(found.name), self._store.list_places(found)
            ids = torch.from_numpy(encode_text(self._tokenizer, text, is_whole=True)).long()
            if len(ids) != found.num_tokens:
                raise MemoryFolderError(
                    f"the text of {found.name!r} is {len(ids):,} tokens and was read as "
                    f"{found.num_tokens:,}; use the tokenizer of the model that read it"
                )
            self._tokens[document] = (places, ids[places])
        return self._tokens[document]

    def read_ids(self) -> Tensor:
        """(n,) int64: the tokens of the entries of all documents.

        Raises:
            MemoryFolderError: a text became other tokens than were read.
        """
        ids = (self.read_tokens(document)[1] for document in range(len(self._documents)))
        return torch.cat([torch.zeros(0, dtype=torch.int64), *ids])

    def find_kept(self, document: int, numbers: Tensor) -> None:
        """Nothing: passages are read again."""

    def shelve(self, collection: Collection) -> Shelf:
        """These documents, to be searched."""
        return Shelf(collection, self)


class KeptEntries:
    """Entries of all layers that a store keeps, as they are when it is made."""

    def __init__(self, store: TextStore, tokenizer: Any) -> None:
        """Take the documents that are there now.

        Without all of their texts, or a tokenizer, no words find them.

        Raises:
            MemoryFolderError: another tokenizer than theirs.
        """
        self._store = store
        self._documents = store.documents
        self.names: Sequence[str] = [document.name for document in self._documents]
        self.num_entries: Sequence[int] = [one.num_entries for one in self._documents]
        self._read = store.open_entries()
        has_texts = all(map(store.has_text, store.documents))
        self._texts = KeptTexts(store, tokenizer) if has_texts and tokenizer is not None else None
        self.special_ids = () if self._texts is None else self._texts.special_ids

    def read_tokens(self, document: int) -> tuple[Tensor, Tensor]:
        """Of the entries of a document, their places (n,) in it, and -1 for each of them."""
        places = self._store.list_places(self._documents[document])
        return places, torch.full_like(places, -1)

    def read_ids(self) -> Tensor:
        """As of `KeptTexts`; -1 without texts."""
        if self._texts is not None:
            return self._texts.read_ids()
        return torch.full((sum(self.num_entries),), -1)

    def find_kept(self, document: int, numbers: Tensor) -> KeptPassage:
        """What gives keys and values of entries (n,) of a document, counted from its first."""
        return KeptPassage(self._documents[document], numbers, self._read)

    def shelve(self, collection: Collection) -> Shelf:
        """These documents, to be searched."""
        return Shelf(collection, self)


@dataclass(frozen=True)
class KeptPassage:
    """Entries of a document, whatever the store reads or forgets afterwards."""

    document: StoredDocument
    numbers: Tensor
    """(n,), counted from the first of the document."""
    read: ReadStored

    def __call__(self) -> Iterator[tuple[int, tuple[Tensor, Tensor]]]:
        """Keys and values (H, n, D) of these, per layer.

        Raises:
            MemoryFolderError: a file of the folder is damaged.
        """
        return self.read(self.document, self.numbers)

    def __deepcopy__(self, memo: Any) -> KeptPassage:
        """Itself: copies of a text share what never changes."""
        return self


def take_tokenizer(description: FolderDescription, tokenizer: Any) -> FolderDescription:
    """The description with the hash of the tokenizer that texts are read with.

    Raises:
        MemoryFolderError: it has that of another one.
    """
    before = description.settings.get("tokenizer")
    if before is not None and not is_same_tokenizer(str(before), tokenizer):
        raise MemoryFolderError(
            "this memory was read with another tokenizer; use the tokenizer of the model"
        )
    settings = {**description.settings, "tokenizer": hash_tokenizer(tokenizer)}
    return replace(description, settings=settings)
