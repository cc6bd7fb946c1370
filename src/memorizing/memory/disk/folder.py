"""A memory on disk: what a model read, in a folder that can be searched, added to and shared.

manifest.json              what is there; replaced whole, after everything it names is there
segment-<n>.safetensors    entries, never changed after they are named
index/segment-<n>/...      what indexes saved, made from the entries
lock                       held by the one who writes
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from memorizing.errors import MemoryFolderError
from memorizing.index_settings import IndexSettings
from memorizing.memory.disk.contents import Contents
from memorizing.memory.disk.description import FolderDescription
from memorizing.memory.disk.documents import LayerEntries, NewDocument, check_new, make_part
from memorizing.memory.disk.layers import open_layer, save_indexes
from memorizing.memory.disk.lock import hold_lock
from memorizing.memory.disk.manifest import Manifest, SegmentRecord, StoredDocument
from memorizing.memory.disk.merging import merge_folders
from memorizing.memory.disk.parts import Part, take_part
from memorizing.memory.disk.state import create_state, plan_append, read_contents, write_state
from memorizing.memory.disk.writing import MANIFEST, explain_failures, remove_leftovers
from memorizing.memory.frozen import FrozenMemory


class MemoryFolder:
    """Entries of documents on disk. Reading takes no lock; one process may write at a time.

    The object shows the folder as it was when it was opened, refreshed or written by it; memories
    that it opened stay readable whatever is written afterwards.
    """

    def __init__(self, path: Path, contents: Contents) -> None:
        """Take a state; see `create` and `open`."""
        self.path = path
        self.contents = contents
        self._depth = 0
        self._thread_lock = threading.RLock()

    @classmethod
    def create(cls, path: Path | str, description: FolderDescription) -> MemoryFolder:
        """Make an empty memory in a folder that is new or empty.

        Raises:
            MemoryFolderError: the folder holds something, or is being written.
            ResourceError: it cannot be written.
        """
        path, manifest = Path(path), Manifest(description)
        create_state(path, manifest)
        return cls(path, Contents(path, manifest))

    @classmethod
    def open(cls, path: Path | str, *, fingerprint: str | None = None) -> MemoryFolder:
        """Open a memory: manifest, sizes and headers are checked now, checksums at first touch.

        Args:
            path: of the folder.
            fingerprint: of the model that will read it; None is not compared.

        Raises:
            MemoryFolderError: there is no memory, or one of another model or format version, or it
                is damaged.
        """
        path = Path(path)
        contents = read_contents(path)
        found = contents.manifest.description.fingerprint
        if fingerprint is not None and found != fingerprint:
            raise MemoryFolderError(
                f"{path} holds what a model of the fingerprint {found!r} read, and this one has "
                f"{fingerprint!r}; use the model that wrote it, or read the text again"
            )
        return cls(path, contents)

    @classmethod
    def merge(
        cls,
        paths: Sequence[Path | str],
        out: Path | str,
        settings: Mapping[str, Any] | None = None,
    ) -> MemoryFolder:
        """Make a new memory of several of the same model, in their order; they stay as they are.

        A document that several hold, with the same text, is kept once. Few large segments are made;
        a single path is therefore packed. Indexes are not taken over.

        Args:
            paths: of the folders.
            out: a folder that is new or empty. Until all is written it is not there.
            settings: of the new one; None is those of the folders, which must be equal then.

        Raises:
            MemoryFolderError: memories of different models or shapes, or different texts of one
                name; a damaged one; `out` holds something.
            ResourceError: it cannot be written.
        """
        merge_folders([Path(path) for path in paths], Path(out), settings)
        return cls.open(out)

    @property
    def description(self) -> FolderDescription:
        """What the entries have in common."""
        return self.contents.manifest.description

    @property
    def documents(self) -> tuple[StoredDocument, ...]:
        """What was read, oldest first."""
        return self.contents.documents

    @property
    def num_entries(self) -> int:
        """Of each layer."""
        return self.contents.manifest.num_entries

    def refresh(self) -> None:
        """See what others have written since. Memories that were opened before stay as they are.

        Raises:
            MemoryFolderError: as in `open`.
        """
        self.contents = read_contents(self.path, self.contents)

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Be the only writer for a while, so that another is refused at once and not midway.

        On entry the folder is read again and leftovers of writers that were killed are removed.

        Raises:
            MemoryFolderError: another writer is there, or the folder is damaged.
            ResourceError: the folder cannot be written.
        """
        with self._thread_lock, contextlib.ExitStack() as stack:
            if self._depth == 0:
                with explain_failures(self.path):
                    stack.enter_context(hold_lock(self.path))
                    self.refresh()
                    remove_leftovers(self.path, self.contents.manifest)
            self._depth += 1
            try:
                yield
            finally:
                self._depth -= 1

    def append(self, documents: Sequence[NewDocument], entries: LayerEntries) -> None:
        """Add documents after those that are there. All of them are there afterwards, or none.

        A last segment that is small, or not larger than what is added, is written anew together
        with it, so that many small additions make few segments. Every call writes the manifest
        and, of small segments, what was there: give several short documents at once.

        Args:
            documents: new ones, in the order of their entries.
            entries: per layer, keys and values (H, n, D) of all documents together.

        Raises:
            MemoryFolderError: documents that are there already, entries of other shapes or that
                are not finite, or another writer.
            ResourceError: the folder cannot be written; what it held is still whole.
        """
        with self.lock():
            check_new(self.path, self.contents, documents)
            part = make_part(self.description, documents, entries)
            if documents:
                self._write(plan_append(self.contents, part))

    def forget(self, name: str) -> None:
        """Remove a document: its entries and its text are gone from the disk afterwards.

        Raises:
            MemoryFolderError: there is no such document, another writer, or a damaged segment.
            ResourceError: the folder cannot be written; what it held is still whole.
        """
        with self.lock():
            document = self.contents.find_document(name)
            if document is None:
                raise MemoryFolderError(
                    f"{self.path} holds no document {name!r}, so it cannot be forgotten; it holds "
                    f"{len(self.documents):,} documents: look for its name among them"
                )
            self._write(
                [
                    [take_part(segment, self.documents, without=name)]
                    if segment.record.file == document.segment
                    else segment.record
                    for segment in self.contents.segments
                ]
            )

    def describe(self, fingerprint: str, settings: Mapping[str, Any]) -> None:
        """Replace what the caller keeps with the entries; see `FolderDescription`.

        Raises:
            MemoryFolderError: another writer.
            ResourceError: the folder cannot be written; what it held is still whole.
        """
        with self.lock():
            described = replace(self.description, fingerprint=fingerprint, settings=dict(settings))
            before = replace(self.contents.manifest, description=described)
            with explain_failures(self.path):
                manifest = write_state(self.path, before, before.segments)
            self.contents = Contents(self.path, manifest, self.contents)

    def verify(self) -> tuple[str, ...]:
        """Compare the checksums of everything that is in the folder now.

        Returns:
            The files that were checked.

        Raises:
            MemoryFolderError: a file was altered or is missing; the message names it.
        """
        contents = read_contents(self.path)
        for segment in contents.segments:
            segment.verify()
        return (MANIFEST, *(segment.file for segment in contents.manifest.segments))

    def save_indexes(self, index: IndexSettings) -> None:
        """Build an index of every segment and save it, so that `open_layer` need not build it.

        Nothing is saved of indexes that are built as quickly as they are read, and of segments that
        are smaller than a block. May take minutes.

        Raises:
            MemoryFolderError: another writer, or a damaged segment.
            IndexUnavailableError: it needs a package that is not installed.
            ResourceError: the folder cannot be written.
        """
        with self.lock(), explain_failures(self.path):
            save_indexes(self.path, self.contents, index)

    def open_layer(
        self,
        layer: int,
        device: torch.device | str = "cpu",
        index: IndexSettings | None = None,
        *,
        heads: Sequence[int] | None = None,
    ) -> FrozenMemory:
        """The entries of one layer, to be searched. Nothing is read before the first search.

        On the CPU the entries are read where they are mapped, a block per segment. On another
        device, and where they are stored in int8, they are copied, decoded to bfloat16.

        Args:
            layer: one that this memory has.
            device: where it is searched.
            index: what searches every block; None is exact search. What `save_indexes` saved is
                read and not built.
            heads: those of keys that are searched, ascending; None is all. Unless they are
                neighbors, they are copied. With an index that `save_indexes` saves it must be all.

        Raises:
            MemoryFolderError: there is no such layer.
            ConfigError: heads that are not there, or some of them and an index of all.
            IndexUnavailableError: the index needs a package that is not installed.
        """
        return open_layer(self.path, self.contents, layer, device, index, heads)

    def _write(self, segments: Sequence[SegmentRecord | Sequence[Part]]) -> None:
        """Replace the state; the lock is held."""
        with explain_failures(self.path):
            manifest = write_state(self.path, self.contents.manifest, segments)
        self.contents = Contents(self.path, manifest, self.contents)
