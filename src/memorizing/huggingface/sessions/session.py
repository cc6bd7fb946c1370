"""What a model has read: bound to it for a while, kept in a folder."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from memorizing.data import Document
from memorizing.errors import ConfigError, MemoryFolderError, StateError
from memorizing.huggingface.attaching.attachment import Attachment
from memorizing.huggingface.attaching.passage_room import Library
from memorizing.huggingface.attaching.step import OpenMemory
from memorizing.huggingface.sessions.reading import (
    OnRead,
    ReadDocument,
    Readers,
    join_entries,
    read_document,
    show_progress,
)
from memorizing.huggingface.sessions.sources import Sources
from memorizing.huggingface.sessions.stores import FolderStore, RamStore
from memorizing.huggingface.sessions.texts import list_documents
from memorizing.memory.disk import NewDocument, StoredDocument, hash_text
from memorizing.memory.frozen import SearchedMemory

_FLUSH = 16_384
"""Entries that are read before they are written."""
_FLUSH_BYTES = 2**28
"""Bytes of entries, likewise: those of all layers are many."""


@dataclass
class ReadReport:
    """What `MemorySession.read` did."""

    num_documents: int = 0
    num_tokens: int = 0
    num_entries: int = 0
    skipped: list[str] = field(default_factory=list)
    """Documents that were there already, with the same text."""
    without_entries: list[str] = field(default_factory=list)
    """Documents that were read and have nothing in memory: all of their tokens are sinks
    (`num_sinks`), which are not stored."""

    def add(self, document: NewDocument | StoredDocument) -> None:
        """Count a document that was read."""
        self.num_documents += 1
        self.num_tokens += document.num_tokens
        self.num_entries += document.num_entries
        if not document.num_entries:
            self.without_entries.append(document.name)


class MemorySession:
    """An open memory. While it is entered, the model reads it and remembers what it writes.

    Every text that goes through a cache of its own (each call of `generate`) has a memory of its
    own, which grows by its tokens and ends with the cache. What `read` took in is shared by all
    texts, and stays.
    """

    def __init__(
        self,
        attachment: Attachment,
        store: RamStore | FolderStore,
        *,
        keep_text: bool,
        tokenizer: Any = None,
    ) -> None:
        """See `open_memory`."""
        self._tokenizer = tokenizer
        self._attachment = attachment
        self._store = store
        self._keep_text = keep_text
        self._is_entered = False
        self._planned: OpenMemory | None = None
        """For `use`, until what is stored changes."""
        self._lock = threading.RLock()
        """For what is stored and what the model reads of it to be the same, whoever changes it."""

    def __enter__(self) -> MemorySession:
        """Bind the memory to the model.

        Raises:
            StateError: another memory is open, or the model's memory layers were copied or wrapped.
        """
        if self._attachment.is_bound:
            raise StateError("this model has a memory open already; leave its with block first")
        self._attachment.check_layers()
        with self._lock:
            self._bind()
            self._is_entered = True
        return self

    def __exit__(self, *error: object) -> None:
        """Unbind it. What was read into a folder is there; what was not is gone with the object."""
        with self._lock:
            # Another memory may be open since.
            if self._is_entered:
                self._attachment.unbind()
            self._is_entered = False

    @contextmanager
    def use(self) -> Iterator[None]:
        """Let the calls of this thread, or task, read it, whatever is open for others.

        So one model answers from several memories, in turn. Nothing is opened again until what is
        stored changes.

        Raises:
            StateError: the model's memory layers were copied or wrapped.
        """
        with self._lock:
            if self._planned is None:
                self._attachment.check_layers()
                self._planned = self._attachment.plan_opening(*self._open())
            opened = self._planned
        with self._attachment.change_mode(opened=opened):
            yield

    def _bind(self) -> None:
        self._attachment.bind(*self._open())

    def _open(self) -> tuple[Mapping[int, SearchedMemory], Library | None]:
        attachment, store = self._attachment, self._store
        library = store.open_library(attachment.settings, self._tokenizer)
        return store.open_layers(attachment.devices, attachment.open_heads), library

    def _follow(self) -> None:
        """Let the model read what is stored now."""
        self._planned = None
        if self._is_entered:
            self._bind()

    @property
    def documents(self) -> tuple[StoredDocument, ...]:
        """What was read, oldest first."""
        return self._store.documents

    @property
    def num_entries(self) -> int:
        """Entries of each layer that were read."""
        return sum(document.num_entries for document in self.documents)

    @property
    def left_out(self) -> Mapping[int, int]:
        """Of a memory that is served, per shard the times that it was asked and did not answer."""
        return self._store.left_out

    def read_text(self, name: str) -> str | None:
        """The text of a document that was read; None where it was not kept.

        Raises:
            MemoryFolderError: there is no such document, or a file of the folder is damaged.
        """
        return self._store.read_text(name) if self._store.has_text(self._find(name)) else None

    def list_tokens(self, name: str) -> Tensor:
        """(num_entries,) int64: the token of every entry of a document.

        Raises:
            MemoryFolderError: there is no such document, or a file of the folder is damaged.
        """
        return self._store.list_places(self._find(name))

    def _find(self, name: str) -> StoredDocument:
        for document in self.documents:
            if document.name == name:
                return document
        raise MemoryFolderError(f"no document {name!r} was read; see memory.documents")

    @torch.inference_mode(False)
    def read(
        self,
        tokenizer: Any,
        documents: Any,
        *,
        update: bool = False,
        progress: bool | OnRead = True,
        readers: Readers | None = None,
    ) -> ReadReport:
        """Read documents into the memory, one after another. Nothing is trained.

        A document's entries do not depend on what else is in memory. One with the name and the text
        of a document that is there already is skipped, so that the same call goes on where it was
        stopped. An interrupt first keeps the documents that were read whole.

        Args:
            tokenizer: of the model; it puts its special tokens around each document.
            documents: (name, text) pairs, a dict of them, or documents of `load_corpus`.
            update: a document replaces one of the same name and another text, in one step.
            progress: show a progress bar on the terminal; or what is called after every segment
                with the name of its document and its tokens.
            readers: other processes that read, into a folder; see `memorizing.ray`. None reads
                here. Documents stand in another order then.

        Raises:
            ConfigError: readers, and no folder.
            MemoryFolderError: a name that is there with another text, another tokenizer than that
                of the documents that are there, or a folder that cannot be written.
            CorpusError: something that is no document.
        """
        self._tokenizer = tokenizer
        report = ReadReport()
        show = nullcontext(progress) if callable(progress) else show_progress(progress)
        with self._store.write(tokenizer), show as on_read:
            new = self._list_new(documents, update, report)
            try:
                if readers is None:
                    self._read_here(new, on_read, report)
                else:
                    self._read_elsewhere(readers, new, on_read, report)
            finally:
                with self._lock:
                    self._follow()
        return report

    def _list_new(self, documents: Any, update: bool, report: ReadReport) -> Iterator[Document]:
        """Those that are not there yet, or are there with another text and shall be replaced."""
        given: dict[str, str] = {}
        for document in list_documents(documents):
            stored, sha256 = self._store.find_document(document.name), hash_text(document.text)
            known = given.get(document.name) or (stored and stored.sha256)
            if known == sha256:
                report.skipped.append(document.name)
                continue
            if known is not None and (document.name in given or not update):
                raise MemoryFolderError(
                    f"a document {document.name!r} with another text is in memory already; replace "
                    "it (update=True, or `memorizing read --update`), or give another name"
                )
            given[document.name] = sha256
            yield document

    def _read_here(
        self, documents: Iterator[Document], on_read: OnRead, report: ReadReport
    ) -> None:
        waiting: list[ReadDocument] = []
        most = min(_FLUSH, _FLUSH_BYTES // self._store.description.bytes_per_entry)
        try:
            for document in documents:
                read = read_document(
                    self._attachment, self._tokenizer, document, on_read, keep_text=self._keep_text
                )
                waiting.append(read)
                report.add(read.description)
                if sum(one.description.num_tokens for one in waiting) >= most:
                    self._flush(waiting)
        finally:
            self._flush(waiting)

    def _read_elsewhere(
        self, readers: Readers, documents: Iterator[Document], on_read: OnRead, report: ReadReport
    ) -> None:
        store = self._store
        if not isinstance(store, FolderStore):
            raise ConfigError(
                "several processes read into a folder, and this memory has none; give its path to "
                "open_memory"
            )

        def take_over(folders: Iterator[Path]) -> None:
            for folder in folders:
                with self._lock:
                    for document in store.take_over(folder):
                        report.add(document)

        path, keep_text = store.path, self._keep_text
        try:
            take_over(readers.read(documents, path, keep_text=keep_text, on_read=on_read))
        finally:
            take_over(readers.stop())

    def _flush(self, waiting: list[ReadDocument]) -> None:
        documents = list(waiting)
        waiting.clear()
        if documents:
            entries = join_entries(self._attachment, documents)
            with self._lock:
                self._store.append([document.description for document in documents], entries)

    def forget(self, name: str) -> None:
        """Forget a document; its entries and text are gone, from a folder too.

        Raises:
            MemoryFolderError: there is no such document.
        """
        with self._lock:
            self._store.forget(name)
            self._follow()

    def save(self, path: Path | str, *, dtype: str | None = None) -> None:
        """Write everything that was read into a new folder.

        Args:
            path: a folder that is new or empty.
            dtype: of the entries there: bfloat16, float16, float32 or int8; None is that of the
                memory.

        Raises:
            MemoryFolderError: the folder holds something.
            ResourceError: it cannot be written.
        """
        with self._lock:
            self._store.save(Path(path), dtype)

    def new_cache(self) -> DynamicCache:
        """A cache for a text of its own, for the model's argument `past_key_values`.

        Since transformers 5.24 the argument is called `cache`.
        """
        return self._attachment.make_cache()

    def commit(self, cache: DynamicCache) -> None:
        """In training, after the backward pass of a segment: let its entries be retrieved.

        Without gradients the next call does this by itself. Changes the memory of the text in
        place, and cuts the cache off from the graph.

        Raises:
            StateError: the cache has no memory.
        """
        self._attachment.commit(cache)

    @contextmanager
    def record(self) -> Iterator[Sources]:
        """Collect which documents the calls inside retrieve from."""
        sources = Sources(self._store, self._tokenizer)
        with self._attachment.listen(sources.add):
            yield sources
