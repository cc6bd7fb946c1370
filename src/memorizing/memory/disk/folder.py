"""A memory on disk: what a model read, in a folder that can be searched, added to and shared.

manifest.json              what is there; replaced whole, after everything it names is there
segment-<n>.safetensors    entries, never changed after they are named
index/segment-<n>/...      what indexes saved, made from the entries
lock                       held by the one who writes
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from memorizing.errors import MemoryFolderError, ResourceError
from memorizing.index_settings import ExactSettings, IndexSettings
from memorizing.memory.disk import state
from memorizing.memory.disk.contents import Contents
from memorizing.memory.disk.documents import LayerEntries, NewDocument, check_new, make_part
from memorizing.memory.disk.layers import StoredLayer
from memorizing.memory.disk.manifest import (
    MANIFEST,
    FolderDescription,
    Manifest,
    StoredDocument,
    format_manifest,
)
from memorizing.memory.disk.segment import Part, SegmentFile
from memorizing.memory.frozen import FrozenMemory
from memorizing.storage.files import (
    explain_failures,
    name_temporary,
    remove,
    remove_leftovers,
    sync,
    write_bytes,
)
from memorizing.storage.folders import replace_folder
from memorizing.storage.locks import hold_lock


class MemoryFolder:
    """Entries of documents on disk. Reading takes no lock; one thread may write at a time.

    The object shows the folder as it was when it was opened, refreshed or written by it; memories
    that it opened stay readable whatever is written afterwards.
    """

    def __init__(self, path: Path, contents: Contents) -> None:
        """Take a state; see `create` and `open`."""
        self.path = path
        self.contents = contents
        self._owner: tuple[int, int] | None = None

    @classmethod
    def create(cls, path: Path | str, description: FolderDescription) -> MemoryFolder:
        """Make an empty memory in a folder that is new or empty.

        Raises:
            MemoryFolderError: the folder holds something, or is being written.
            ResourceError: it cannot be written.
        """
        path, manifest = Path(path), Manifest(description)
        state.check_free(path)
        with explain_failures(f"the memory {path}"):
            path.mkdir(parents=True, exist_ok=True)
            with hold_lock(path, MemoryFolderError):
                # Another process may have been faster.
                state.check_free(path)
                state.remove_unnamed(path, manifest)
                write_bytes(path / MANIFEST, format_manifest(manifest))
            sync(path.parent)
        return cls(path, Contents(path, manifest))

    @classmethod
    def open(cls, path: Path | str, *, fingerprint: str | None = None) -> MemoryFolder:
        """Open a memory: manifest, sizes and headers are checked now, checksums at first touch.

        What a writer that was killed left is removed, where nobody writes: it may be of documents
        that were forgotten.

        Args:
            path: of the folder.
            fingerprint: of the model that will read it; None is not compared.

        Raises:
            MemoryFolderError: there is no memory, or one of another model or format version, or it
                is damaged.
        """
        path = Path(path)
        opened = cls(path, state.read_contents(path))
        found = opened.description.fingerprint
        if fingerprint is not None and found != fingerprint:
            raise MemoryFolderError(
                f"{path} holds what a model of the fingerprint {found!r} read, and this one has "
                f"{fingerprint!r}; use the model that wrote it, or read the text again"
            )
        # A folder that cannot be written is read as it is.
        with contextlib.suppress(MemoryFolderError, OSError):
            if any(state.list_unnamed(path, opened.contents.manifest)):
                with opened.lock():
                    pass
        return opened

    @classmethod
    def find(cls, path: Path | str) -> MemoryFolder | None:
        """Open a memory, or None where there is none and one may be made.

        Raises:
            MemoryFolderError: as in `open`, or the path is a file.
        """
        path = Path(path)
        if path.exists() and not path.is_dir():
            raise MemoryFolderError(f"{path} is a file; a memory is a folder: give another name")
        return cls.open(path) if state.list_held(path) else None

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
        if not paths:
            raise MemoryFolderError("no memory to merge was named; name one or more")
        out = Path(os.path.realpath(out))
        state.check_free(out)
        sources = [state.read_contents(Path(path)) for path in paths]
        manifest = Manifest(state.unite_descriptions(sources, settings))
        parts = state.choose_parts(sources)
        with explain_failures(f"the memory {out}"), contextlib.ExitStack() as stack:
            out.parent.mkdir(parents=True, exist_ok=True)
            remove_leftovers(out.parent)
            state.remove_old_merge(out.with_name(f".{out.name}.part"))
            unfinished = stack.enter_context(name_temporary(out.parent))
            unfinished.mkdir()
            state.write_state(unfinished, manifest, _let_go_between(parts, sources))
            if out.exists():
                stack.enter_context(hold_lock(out, MemoryFolderError))
                state.check_free(out)
            replace_folder(unfinished, out)
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
        self.contents = state.read_contents(self.path, self.contents)

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Be the only writer for a while, so that another is refused at once and not midway.

        On entry the folder is read again and leftovers of writers that were killed are removed. A
        thread may enter it again; a forked child is another writer.

        Raises:
            MemoryFolderError: another writer is there, or the folder is damaged.
            ResourceError: the folder cannot be written.
        """
        me = (os.getpid(), threading.get_ident())
        if self._owner == me:
            yield
            return
        with contextlib.ExitStack() as stack:
            with self._explain_failures():
                stack.enter_context(hold_lock(self.path, MemoryFolderError))
                self.refresh()
                state.remove_unnamed(self.path, self.contents.manifest)
            self._owner = me
            try:
                yield
            finally:
                self._owner = None

    def append(
        self,
        documents: Sequence[NewDocument],
        entries: LayerEntries,
        *,
        replaced: Collection[str] = (),
    ) -> None:
        """Add documents after those that are there. All of them are there afterwards, or none.

        A last segment that is small, or not larger than what is added, is written anew together
        with it, so that many small additions make few segments. Every call writes the manifest
        and, of small segments, what was there: give several short documents at once.

        Args:
            documents: new ones, in the order of their entries.
            entries: per layer, keys and values (H, n, D) of all documents together.
            replaced: names of documents that are forgotten in the same step, where they are there:
                at every moment the folder holds these or the new ones.

        Raises:
            MemoryFolderError: documents that are there already, entries of other shapes or that
                are not finite, or another writer.
            ResourceError: the folder cannot be written; what it held is still whole.
        """
        with self.lock():
            check_new(self.contents, documents, replaced)
            part = make_part(self.description, documents, entries)
            if documents:
                self._change(replaced, part)

    def take_over(self, path: Path | str) -> tuple[StoredDocument, ...]:
        """Add all that another memory of the same model holds, and leave nothing of that.

        Documents of the same names are replaced, as in `append`. Files are moved where they would
        not be joined with others, so both must be on the same disk. If the process is killed, some
        segments may be here and others there.

        Args:
            path: of the other one, which nobody else uses.

        Returns:
            The documents of the other one.

        Raises:
            MemoryFolderError: a memory of another model or other entries, or another writer.
            ResourceError: the folder cannot be written; what it held is still whole.
        """
        other = MemoryFolder.open(path)
        with self.lock():
            state.unite_descriptions([self.contents, other.contents], self.description.settings)
            for segment in other.contents.segments:
                part = segment.take(other.documents)
                self._change({one.name for one in part.documents}, part, moved=segment)
        with self._explain_failures():
            remove(other.path)
        return other.documents

    def forget(self, *names: str) -> None:
        """Remove documents: their entries and texts are gone from the disk afterwards.

        Every segment that holds some of them is written anew, once, all in one step. Where the disk
        has no room for that, segments are written one by one, those with the least to keep first;
        one of which nothing is kept needs no room.

        Raises:
            MemoryFolderError: there is no such document, another writer, or a damaged segment.
                Nothing is forgotten then.
            ResourceError: the folder cannot be written; every document is still whole or gone.
        """
        with self.lock():
            for name in names:
                if self.contents.find_document(name) is None:
                    raise MemoryFolderError(
                        f"{self.path} holds no document {name!r}, so it cannot be forgotten; it "
                        f"holds {len(self.documents):,} documents: look for its name among them"
                    )
            try:
                self._change(names)
            except ResourceError:
                # It may have come after the manifest was replaced.
                self.refresh()
                kept: dict[str, int] = {}
                gone: dict[str, set[str]] = {}
                for one in self.documents:
                    is_kept = one.name not in names
                    kept[one.segment] = kept.get(one.segment, 0) + is_kept * one.num_entries
                    if not is_kept:
                        gone.setdefault(one.segment, set()).add(one.name)
                if not gone:
                    raise
                for file in sorted(gone, key=lambda file: kept[file]):
                    # What was saved of its entries is not of those that are kept.
                    remove(self.path / state.INDEXES / Path(file).stem)
                    self._change(gone[file])

    def describe(self, fingerprint: str, settings: Mapping[str, Any]) -> None:
        """Replace what the caller keeps with the entries; see `FolderDescription`.

        Raises:
            MemoryFolderError: another writer.
            ResourceError: the folder cannot be written; what it held is still whole.
        """
        with self.lock():
            described = replace(self.description, fingerprint=fingerprint, settings=dict(settings))
            self._change(manifest=replace(self.contents.manifest, description=described))

    def verify(self) -> tuple[str, ...]:
        """Compare the checksums of everything that is in the folder now.

        Returns:
            The files that were checked.

        Raises:
            MemoryFolderError: a file was altered or is missing; the message names it.
        """
        contents = state.read_contents(self.path)
        for segment in contents.segments:
            segment.verify()
        return (MANIFEST, *(segment.file for segment in contents.manifest.segments))

    def save_indexes(
        self, index: IndexSettings, heads: Mapping[int, Sequence[int]] | None = None
    ) -> None:
        """Build an index of every segment and save it, so that `open_layer` need not build it.

        Nothing is saved of indexes that are built as quickly as they are read, and of segments that
        are smaller than a block. May take minutes.

        Args:
            index: what searches every block.
            heads: per layer, those of keys that `open_layer` will be asked for; None is all of all
                layers.

        Raises:
            ConfigError: heads that are not there.
            MemoryFolderError: another writer, or a damaged segment.
            IndexUnavailableError: it needs a package that is not installed.
            ResourceError: the folder cannot be written.
        """
        with self.lock(), self._explain_failures():
            every = dict.fromkeys(self.description.layers, range(self.description.num_heads))
            for layer, chosen in (every if heads is None else heads).items():
                cpu = torch.device("cpu")
                StoredLayer(self.contents, layer, index, cpu, chosen).save_indexes()

    def open_layer(
        self,
        layer: int,
        device: torch.device | str = "cpu",
        index: IndexSettings | None = None,
        *,
        heads: Sequence[int] | None = None,
        forgotten: Collection[str] = (),
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
                neighbors, they are copied. What `save_indexes` saved must be of the same heads.
            forgotten: names of documents whose entries are left out, as if they had been forgotten.
                What remains of a segment that has some is copied, and its index built.

        Raises:
            MemoryFolderError: there is no such layer.
            ConfigError: heads that are not there.
            IndexUnavailableError: the index needs a package that is not installed.
        """
        every = range(self.description.num_heads)
        return StoredLayer(
            self.contents,
            layer,
            index or ExactSettings(),
            torch.device(device),
            every if heads is None else heads,
            forgotten,
        ).open()

    def _change(
        self,
        forgotten: Collection[str] = (),
        part: Part | None = None,
        manifest: Manifest | None = None,
        moved: SegmentFile | None = None,
    ) -> None:
        """Go to the state without these documents and with a part more; the lock is held."""
        with self._explain_failures():
            segments = state.plan_change(self.contents, forgotten, part, moved)
            after = state.write_state(self.path, manifest or self.contents.manifest, segments)
        self.contents = Contents(self.path, after, self.contents)

    def _explain_failures(self) -> contextlib.AbstractContextManager[None]:
        return explain_failures(f"the memory {self.path}")


def _let_go_between(parts: state.Segments, sources: Sequence[Contents]) -> state.Segments:
    """The same, and after each, what was read of the sources is not kept in memory."""
    for part in parts:
        yield part
        for source in sources:
            for segment in source.segments:
                segment.let_go()
