"""What a model has read: bound to it for a while, kept in a folder."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor
from transformers import DynamicCache

from memorizing.data import Document
from memorizing.errors import ConfigError, MemoryFolderError, StateError
from memorizing.huggingface.attaching.attachment import (
    Attachment,
    add_memory,
    describe_heads,
    find_attachment,
    get_attachment,
    list_open_heads,
    parse_heads,
    remove_memory,
)
from memorizing.huggingface.attaching.fingerprint import (
    Fingerprint,
    explain_difference,
    shorten,
)
from memorizing.huggingface.attaching.memory_settings import MemorySettings
from memorizing.huggingface.attaching.step import OpenMemory
from memorizing.huggingface.sessions.library import KeptEntries, KeptTexts
from memorizing.huggingface.sessions.reading import (
    OnRead,
    ReadDocument,
    join_entries,
    read_document,
    show_progress,
)
from memorizing.huggingface.sessions.sources import Sources
from memorizing.huggingface.sessions.stores import FolderStore, RamStore
from memorizing.huggingface.sessions.texts import list_documents
from memorizing.index_settings import parse_index
from memorizing.memory.disk import FolderDescription, MemoryFolder, StoredDocument, hash_text
from memorizing.memory.frozen import FrozenMemory

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

    def _open(self) -> tuple[dict[int, FrozenMemory], KeptEntries | KeptTexts | None]:
        attachment = self._attachment
        library = None
        if attachment.settings.keep == "entries":
            library = KeptEntries(self._store, self._tokenizer)
        elif attachment.settings.finds_passages:
            library = KeptTexts(self._store, self._tokenizer)
        return self._store.open_layers(attachment.devices, attachment.open_heads), library

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

        Raises:
            MemoryFolderError: a name that is there with another text, another tokenizer than that
                of the documents that are there, or a folder that cannot be written.
            CorpusError: something that is no document.
        """
        self._tokenizer = tokenizer
        report = ReadReport()
        waiting: dict[str, ReadDocument] = {}
        most = min(_FLUSH, _FLUSH_BYTES // self._store.description.bytes_per_entry)
        show = nullcontext(progress) if callable(progress) else show_progress(progress)
        with self._store.write(tokenizer), show as on_read:
            try:
                for document in list_documents(documents):
                    if self._is_known(document, waiting.get(document.name), update):
                        report.skipped.append(document.name)
                        continue
                    read = read_document(
                        self._attachment, tokenizer, document, on_read, keep_text=self._keep_text
                    )
                    waiting[document.name] = read
                    report.num_documents += 1
                    report.num_tokens += read.description.num_tokens
                    report.num_entries += read.description.num_entries
                    if not read.description.num_entries:
                        report.without_entries.append(document.name)
                    if sum(one.description.num_tokens for one in waiting.values()) >= most:
                        self._flush(waiting)
            finally:
                self._flush(waiting)
                with self._lock:
                    self._follow()
        return report

    def _is_known(self, document: Document, waiting: ReadDocument | None, update: bool) -> bool:
        known = waiting.description if waiting else self._store.find_document(document.name)
        if known is None or known.sha256 == hash_text(document.text):
            return known is not None
        if update and waiting is None:
            return False
        raise MemoryFolderError(
            f"a document {document.name!r} with another text is in memory already; replace it "
            "(update=True, or `memorizing read --update`), or give another name"
        )

    def _flush(self, waiting: dict[str, ReadDocument]) -> None:
        documents = list(waiting.values())
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


def open_memory(
    model: Any,
    path: Path | str | None = None,
    *,
    keep_text: bool = False,
    tokenizer: Any = None,
    documents: Sequence[str] | None = None,
    dtype: str | None = None,
    fingerprint: Fingerprint | None = None,
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
            Where passages are read they always are.
        tokenizer: of the model, where passages are read from a folder: words find them too. `read`
            gives one. Without it, passages that are kept as entries are found by heads alone.
        documents: patterns of names; only documents that one of them matches are searched, as if
            the folder had no others, and nothing is read or forgotten. A pattern is a name, or one
            of `fnmatch` for whole names, in which case counts: `*` is any characters, slashes too,
            `?` is one, `[ab]` one of these. None is all.
        dtype: of a new folder's entries; None is that of the memory.
        fingerprint: of the model as it is now, for whoever opens many memories and knows that no
            weight changed: `get_attachment(model).fingerprint()`. None computes it, which is a pass
            over the weights.

    Raises:
        MemoryFolderError: the folder is no memory, or one of another model or other layers, or it
            is damaged; a pattern that matches no document.
        ConfigError: the model has no memory, and there is no folder to tell what it should be; or
            `documents` is no list of patterns of a folder.

    Warns:
        UserWarning: the folder is of an older format, which does not say all that is compared; or
            passages are found by other heads than those it was made for.
    """
    if documents is not None:
        _check_patterns(documents, path)
    folder = None if path is None else MemoryFolder.find(path)
    followed = folder if find_attachment(model) is None else None
    if followed is not None:
        add_memory(model, **_read_settings(followed).to_dict())
    try:
        attachment = get_attachment(model)
        if followed is not None:
            heads = parse_heads(followed.description.settings.get("heads"))
            attachment.load_heads(heads, str(followed.path), MemoryFolderError)
        mine = attachment.fingerprint() if fingerprint is None else fingerprint
        if folder is not None:
            _check_folder(folder, attachment, mine)
        description = _describe(attachment, mine, dtype)
        index = parse_index(attachment.settings.index)
        store = (
            RamStore(description, index)
            if path is None
            else FolderStore(Path(path), folder, description, index, documents)
        )
    except BaseException:
        if followed is not None:
            remove_memory(model)
        raise
    settings = attachment.settings
    keep_text = keep_text or settings.finds_passages
    return MemorySession(attachment, store, keep_text=keep_text, tokenizer=tokenizer)


def _check_patterns(patterns: Any, path: Path | str | None) -> None:
    """Refuse what are no patterns, or of nothing.

    Raises:
        ConfigError: with what is allowed.
    """
    is_list = isinstance(patterns, Sequence) and not isinstance(patterns, (str, bytes))
    if not is_list or not patterns or not all(one and isinstance(one, str) for one in patterns):
        raise ConfigError(
            f"documents is {patterns!r}; give one pattern of names or more, such as "
            "documents=['src/*.py'], or None for all"
        )
    if path is None:
        raise ConfigError(
            "documents chooses among those of a folder, and this memory has none; give its path"
        )


def _check_folder(folder: MemoryFolder, attachment: Attachment, mine: Fingerprint) -> None:
    """Refuse a folder whose entries this model did not write.

    Raises:
        MemoryFolderError: with what differs.
    """
    found, layers = folder.description, attachment.kept_layers
    if found.layers != layers and attachment.settings.keep == "entries":
        raise MemoryFolderError(
            f"{folder.path} has entries of layers {list(found.layers)}, and passages that are kept "
            f"as entries need those of all, {list(layers)}; make such a memory with `memorizing "
            "read MODEL FILES --memory NEW --set keep=entries`, or read "
            "passages again from texts (keep='text')"
        )
    if found.layers != layers:
        raise MemoryFolderError(
            f"{folder.path} has entries of layers {list(found.layers)}, and this model's memory "
            f"layers are {list(layers)}; call add_memory with these layers, or read the text again"
        )
    stored = found.settings.get("fingerprint")
    is_old = not isinstance(stored, dict)
    reason = explain_difference(
        found.fingerprint if is_old else stored, mine, attachment.decoder, attachment.settings
    )
    if reason is not None:
        raise MemoryFolderError(
            f"{folder.path} was read {reason} (it was {found.settings.get('model')}); use the "
            "model that wrote it, or read the text again"
        )
    chosen, mine_open = (
        list_open_heads(heads) for heads in (found.settings.get("heads"), attachment.dump_heads())
    )
    if attachment.settings.finds_passages and chosen != mine_open:
        warnings.warn(
            f"{folder.path} is for passages that {describe_heads(chosen)} find, and here it is "
            f"{describe_heads(mine_open)}; what the folder says is taken over where open_memory "
            "is called without add_memory",
            stacklevel=3,
        )
    if is_old:
        warnings.warn(
            f"{folder.path} was made by an older release, which did not note whether adapters were "
            "in force; all else was compared, and the next read into it notes it",
            stacklevel=3,
        )


def _read_settings(folder: MemoryFolder) -> MemorySettings:
    """How a memory says that a model reads it; another may have written that."""
    description = folder.description
    if not isinstance(description.settings.get("memory"), dict):
        raise MemoryFolderError(
            "this memory does not say how a model reads it; call add_memory(model, ...) first"
        )
    settings = MemorySettings.from_dict(description.settings["memory"])
    searched = replace(description, dtype=settings.dtype, layers=settings.layers)
    per_entry = searched.bytes_per_entry
    needed, available = settings.capacity * per_entry, psutil.virtual_memory().available
    if needed > available:
        raise MemoryFolderError(
            f"{folder.path} gives a text a memory of capacity {settings.capacity:,}, which takes "
            f"{needed / 2**30:,.1f} GiB, and {available / 2**30:,.1f} GiB are free; call "
            "add_memory(model, capacity=...) first, with one that fits"
        )
    return settings


def _describe(
    attachment: Attachment, fingerprint: Fingerprint, dtype: str | None
) -> FolderDescription:
    settings, model = attachment.settings, attachment.model()
    return FolderDescription(
        shorten(fingerprint),
        attachment.kept_layers,
        *attachment.entry_shape,
        dtype or settings.dtype,
        {
            "memory": settings.to_dict(),
            "heads": attachment.dump_heads(),
            "model": str(getattr(model.config, "_name_or_path", "") or type(model).__name__),
            "fingerprint": fingerprint,
        },
    )
