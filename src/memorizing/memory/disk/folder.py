"""A memory on disk: what a model read, in a folder that can be searched, added to and shared.

manifest.json              what is there; replaced whole, after everything it names is there
segment-<n>.safetensors    entries, never changed after they are named
index/segment-<n>/...      what indexes saved, made from the entries
lock                       held by the one who writes
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from memorizing.errors import MemoryFolderError
from memorizing.index_settings import IndexSettings
from memorizing.memory.disk.contents import Contents
from memorizing.memory.disk.description import FolderDescription
from memorizing.memory.disk.documents import LayerEntries, NewDocument, make_part
from memorizing.memory.disk.layers import open_layer
from memorizing.memory.disk.lock import LOCK, hold_lock
from memorizing.memory.disk.manifest import Manifest, SegmentRecord, StoredDocument
from memorizing.memory.disk.parts import Part, take_part
from memorizing.memory.disk.state import read_contents, write_state
from memorizing.memory.disk.writing import (
    MANIFEST,
    explain_failures,
    remove_leftovers,
    write_whole,
)
from memorizing.memory.frozen import FrozenMemory

SMALL_SEGMENT = 16_384
"""Segments that have at most so many entries together are joined."""
_LARGEST_JOINED = 2**20
"""Entries up to which segments are joined at all."""


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
        path = Path(path)
        with explain_failures(path):
            path.mkdir(parents=True, exist_ok=True)
            with hold_lock(path):
                remove_leftovers(path, None) if not (path / MANIFEST).exists() else None
                held = sorted(one.name for one in path.iterdir() if one.name != LOCK)
                if held:
                    what = "a memory" if MANIFEST in held else f"other files ({held[0]})"
                    raise MemoryFolderError(
                        f"{path} holds {what} already; open it, or choose a new folder"
                    )
                manifest = Manifest(description)
                write_whole(path / MANIFEST, [manifest.to_json()])
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
        with it, so that many small additions make few segments.

        Args:
            documents: new ones, in the order of their entries.
            entries: per layer, keys and values (H, n, D) of all documents together.

        Raises:
            MemoryFolderError: documents that are there already, entries of other shapes or that
                are not finite, or another writer.
            ResourceError: the folder cannot be written; what it held is still whole.
        """
        with self.lock():
            self._check_new(documents)
            part = make_part(self.description, documents, entries)
            if documents:
                self._write([*self._join(part)])

    def _join(self, part: Part) -> Iterator[SegmentRecord | Sequence[Part]]:
        """The segments of this folder with a part more; the last are joined with it."""
        manifest = self.contents.manifest
        num_entries = sum(document.num_entries for document in part.documents)
        parts, num_kept = [part], len(manifest.segments)
        for segment in reversed(self.contents.segments):
            last = segment.record.num_entries
            is_small = last <= num_entries or last + num_entries <= SMALL_SEGMENT
            if not is_small or last + num_entries > _LARGEST_JOINED:
                break
            parts.insert(0, take_part(segment, manifest.documents))
            num_entries += last
            num_kept -= 1
        yield from manifest.segments[:num_kept]
        yield parts

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

    def verify(self) -> tuple[str, ...]:
        """Compare the checksums of everything now.

        Returns:
            The files that were checked.

        Raises:
            MemoryFolderError: a file was altered; the message names it.
        """
        for segment in self.contents.segments:
            segment.verify()
        return (MANIFEST, *(segment.file for segment in self.contents.manifest.segments))

    def open_layer(
        self, layer: int, device: torch.device | str = "cpu", index: IndexSettings | None = None
    ) -> FrozenMemory:
        """The entries of one layer, to be searched. Nothing is read before the first search.

        On the CPU the entries are read where they are mapped, a block per segment. On another
        device, and where they are stored in int8, they are copied, decoded to bfloat16.

        Args:
            layer: one that this memory has.
            device: where it is searched.
            index: what searches every block; None is exact search. What `save_indexes` saved is
                read and not built.

        Raises:
            MemoryFolderError: there is no such layer.
        """
        return open_layer(self.path, self.contents, layer, device, index)

    def _check_new(self, documents: Sequence[NewDocument]) -> None:
        """Refuse names that are there already, or twice among the new."""
        names: set[str] = set()
        for document in documents:
            there = self.contents.find_document(document.name)
            if there is not None or document.name in names:
                same = there is None or there.sha256 == document.sha256
                remedy = "leave it out" if same else "forget it first, or give another name"
                raise MemoryFolderError(
                    f"{self.path} holds the document {document.name!r} already, with "
                    f"{'the same' if same else 'another'} text; {remedy}"
                )
            names.add(document.name)

    def _write(self, segments: Sequence[SegmentRecord | Sequence[Part]]) -> None:
        """Replace the state; the lock is held."""
        with explain_failures(self.path):
            manifest = write_state(self.path, self.contents.manifest, segments)
        self.contents = Contents(self.path, manifest, self.contents)
