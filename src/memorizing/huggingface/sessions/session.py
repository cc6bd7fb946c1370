"""What a model has read: bound to it for a while, kept in a folder."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from memorizing.errors import MemoryFolderError, StateError
from memorizing.huggingface.attaching.attachment import (
    Attachment,
    add_memory,
    find_attachment,
    get_attachment,
    remove_memory,
)
from memorizing.huggingface.attaching.fingerprint import hash_tokenizer
from memorizing.huggingface.attaching.memory_settings import MemorySettings
from memorizing.huggingface.sessions.reading import (
    ReadDocument,
    Text,
    describe_document,
    join_entries,
    list_texts,
    read_tokens,
    tokenize,
)
from memorizing.huggingface.sessions.stores import FolderStore, RamStore, Store
from memorizing.memory.disk import FolderDescription, MemoryFolder, StoredDocument, hash_text

_FLUSH = 16_384
"""Entries that are read before they are written."""


@dataclass
class ReadReport:
    """What `MemorySession.read` did."""

    num_documents: int = 0
    num_tokens: int = 0
    num_entries: int = 0
    skipped: list[str] = field(default_factory=list)
    """Documents that were there already, with the same text."""


class MemorySession:
    """An open memory. While it is entered, the model reads it and remembers what it writes.

    Every text that goes through a cache of its own (each call of `generate`) has a memory of its
    own, which grows by its tokens and ends with the cache. What `read` took in is shared by all
    texts, and stays.
    """

    def __init__(self, attachment: Attachment, store: Store, *, keep_text: bool) -> None:
        """See `open_memory`."""
        self._attachment = attachment
        self._store = store
        self._keep_text = keep_text

    def __enter__(self) -> MemorySession:
        """Bind the memory to the model.

        Raises:
            StateError: another memory is open.
        """
        if self._attachment.is_bound:
            raise StateError("this model has a memory open already; leave its with block first")
        self._bind()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Unbind it. What was read into a folder is there; what was not is gone with the object."""
        self._attachment.unbind()

    def _bind(self) -> None:
        attachment = self._attachment
        heads = attachment.open_heads
        attachment.bind(self._store.open_layers(attachment.devices, heads), heads)

    @property
    def documents(self) -> tuple[StoredDocument, ...]:
        """What was read, oldest first."""
        return self._store.documents

    @property
    def num_entries(self) -> int:
        """Entries of each layer that were read."""
        return sum(document.num_entries for document in self.documents)

    def read(self, tokenizer: Any, documents: Any, *, progress: bool = True) -> ReadReport:
        """Read documents into the memory, one after another. Nothing is trained.

        A document's entries do not depend on what else is in memory. One with the name and the text
        of a document that is there already is skipped, so that the same call goes on where it was
        stopped. An interrupt first keeps the documents that were read whole.

        Args:
            tokenizer: of the model; it puts its special tokens around each document.
            documents: (name, text) pairs, a dict of them, or documents of `load_corpus`.
            progress: show a progress bar on the terminal.

        Raises:
            MemoryFolderError: a name that is there with another text, another tokenizer than that
                of the documents that are there, or a folder that cannot be written.
            CorpusError: something that is no document.
        """
        from memorizing.huggingface.sessions.progress import show_progress

        report = ReadReport()
        waiting: dict[str, ReadDocument] = {}
        self._store.check_tokenizer(hash_tokenizer(tokenizer))
        with self._store.write(), show_progress(progress) as advance:
            try:
                for text in list_texts(documents):
                    if self._is_known(text, waiting.get(text.name)):
                        report.skipped.append(text.name)
                        continue
                    read = self._read_document(tokenizer, text, advance)
                    waiting[text.name] = read
                    report.num_documents += 1
                    report.num_tokens += read.description.num_tokens
                    report.num_entries += read.description.num_entries
                    if sum(one.description.num_tokens for one in waiting.values()) >= _FLUSH:
                        self._flush(waiting)
            finally:
                self._flush(waiting)
                if self._attachment.is_bound:
                    self._bind()
        return report

    def _read_document(
        self, tokenizer: Any, text: Text, advance: Callable[[str, int], None]
    ) -> ReadDocument:
        read = tokenize(tokenizer, text, with_offsets=self._keep_text)
        pieces = []
        for entries in read_tokens(self._attachment, read.tokens):
            pieces.append(entries)
            advance(text.name, next(iter(entries.values()))[0].shape[1])
        num_sinks = self._attachment.settings.num_sinks
        return ReadDocument(describe_document(read, num_sinks, keep_text=self._keep_text), pieces)

    def _is_known(self, text: Text, waiting: ReadDocument | None) -> bool:
        known = self._store.find_document(text.name) or (waiting and waiting.description)
        if known is None:
            return False
        if known.sha256 != hash_text(text.text):
            raise MemoryFolderError(
                f"a document {text.name!r} with another text is in memory already; forget it first "
                "(memory.forget(name), or `memorizing memory forget`), or give another name"
            )
        return True

    def _flush(self, waiting: dict[str, ReadDocument]) -> None:
        documents = list(waiting.values())
        waiting.clear()
        if documents:
            pieces = [piece for document in documents for piece in document.pieces]
            self._store.append(
                [document.description for document in documents],
                join_entries(pieces, self._attachment),
            )

    def forget(self, name: str) -> None:
        """Forget a document; its entries and text are gone, from a folder too.

        Raises:
            MemoryFolderError: there is no such document.
        """
        self._store.forget(name)
        if self._attachment.is_bound:
            self._bind()

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
        sources, others = Sources(self._store), self._attachment.on_retrieved

        def tell(layer: int, weights: Sequence[Tensor], entries: Sequence[Tensor | None]) -> None:
            sources.add(layer, weights, entries)
            if others is not None:
                others(layer, weights, entries)

        self._attachment.on_retrieved = tell
        try:
            yield sources
        finally:
            self._attachment.on_retrieved = others


class Sources:
    """Attention mass on documents and on the text's own memory, of all calls and open heads."""

    def __init__(self, store: Store) -> None:
        """Nothing yet."""
        self._store = store
        self.mass: dict[str, float] = {}
        self.own_mass = 0.0

    def add(self, layer: int, weights: Sequence[Tensor], entries: Sequence[Tensor | None]) -> None:
        """Take what one layer retrieved.

        Args:
            layer: its number.
            weights: per store (B, H, T, k), shares of attention.
            entries: per store, the numbers of its entries (B, H, T, k) from the first that was
                read; None is the text's own memory.
        """
        for weight, entry in zip(weights, entries, strict=True):
            if entry is None:
                self.own_mass += float(weight.sum())
                continue
            documents = self._store.documents
            found = self._store.number_documents(entry.flatten()).cpu()
            sums = torch.zeros(len(documents), dtype=torch.float64)
            sums.index_add_(0, found, weight.flatten().double().cpu())
            for number in sums.nonzero().flatten().tolist():
                name = documents[number].name
                self.mass[name] = self.mass.get(name, 0.0) + float(sums[number])

    def list(self) -> list[tuple[str, float]]:
        """Documents with their share of all attention to retrieved entries, largest first."""
        total = sum(self.mass.values()) + self.own_mass
        shares = [(name, mass / total) for name, mass in self.mass.items() if total]
        return sorted(shares, key=lambda pair: -pair[1])


def open_memory(
    model: Any,
    path: Path | str | None = None,
    *,
    keep_text: bool = False,
    dtype: str | None = None,
) -> MemorySession:
    """Open a memory for a model that `add_memory` was called on.

        with memorizing.open_memory(model, "repo.memory") as memory:
            memory.read(tokenizer, documents)
            model.generate(**inputs)

    Args:
        model: the model. One without a memory gets one like that of the folder.
        path: folder that holds a memory, or where one is made at the first `read`; None keeps what
            is read only as long as the session lives, unless `save` is called.
        keep_text: also keep the texts of documents read from now on, for `Sources` and reports.
        dtype: of a new folder's entries; None is that of the memory.

    Raises:
        MemoryFolderError: the folder is no memory, or one of another model or other layers, or it
            is damaged.
        ConfigError: the model has no memory, and there is no folder to tell what it should be.
    """
    folder = _open_folder(path)
    followed = folder if find_attachment(model) is None else None
    if followed is not None:
        add_memory(model, **_read_settings(followed.description).to_dict())
    try:
        attachment = get_attachment(model)
        if followed is not None:
            attachment.load_heads(followed.description.settings.get("heads", {}))
        description = _describe(attachment, dtype)
        if folder is not None:
            check_folder(folder, description)
        index = attachment.settings.index
        store = (
            RamStore(description, index)
            if path is None
            else FolderStore(Path(path), folder, description, index)
        )
    except BaseException:
        if followed is not None:
            remove_memory(model)
        raise
    return MemorySession(attachment, store, keep_text=keep_text)


def _open_folder(path: Path | str | None) -> MemoryFolder | None:
    """The memory at a path; None where one may be made."""
    if path is None or not Path(path).exists():
        return None
    if Path(path).is_dir() and not any(Path(path).iterdir()):
        return None
    return MemoryFolder.open(path)


def check_folder(folder: MemoryFolder, description: FolderDescription) -> None:
    """Refuse a folder whose entries this model did not write.

    Raises:
        MemoryFolderError: with what differs.
    """
    found = folder.description
    if found.layers != description.layers:
        raise MemoryFolderError(
            f"{folder.path} has entries of layers {list(found.layers)}, and this model's memory "
            f"layers are {list(description.layers)}; call add_memory with these layers, or read "
            "the text again"
        )
    if found.fingerprint != description.fingerprint:
        raise MemoryFolderError(
            f"{folder.path} was read by another model ({found.settings.get('model')}), or with "
            "another search or num_sinks; use the model that wrote it, or read the text again"
        )


def _read_settings(description: FolderDescription) -> MemorySettings:
    settings = description.settings.get("memory")
    if not isinstance(settings, dict):
        raise MemoryFolderError(
            "this memory does not say how a model reads it; call add_memory(model, ...) first"
        )
    return MemorySettings.from_dict(settings)


def _describe(attachment: Attachment, dtype: str | None) -> FolderDescription:
    settings, model = attachment.settings, attachment.model()
    return FolderDescription(
        attachment.fingerprint(),
        settings.layers,
        *attachment.entry_shape,
        dtype or settings.dtype,
        {
            "memory": settings.to_dict(),
            "heads": attachment.dump_heads(),
            "model": str(getattr(model.config, "_name_or_path", "") or type(model).__name__),
        },
    )
