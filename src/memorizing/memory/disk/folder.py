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
from memorizing.index_settings import IndexSettings
from memorizing.memory.disk.contents import Contents
from memorizing.memory.disk.documents import LayerEntries, NewDocument, check_new, make_part
from memorizing.memory.disk.layers import INDEXES, open_layer, save_indexes
from memorizing.memory.disk.manifest import (
    MANIFEST,
    SEGMENT_NAME,
    FolderDescription,
    Manifest,
    SegmentRecord,
    StoredDocument,
    format_manifest,
    parse_manifest,
)
from memorizing.memory.disk.merging import choose_parts, unite_descriptions
from memorizing.memory.disk.segment import ADVICE, Part, write_segment
from memorizing.memory.frozen import FrozenMemory
from memorizing.storage.files import (
    describe_failure,
    explain_failures,
    is_leftover,
    name_temporary,
    read_bytes,
    remove,
    remove_leftovers,
    sync,
    write_bytes,
)
from memorizing.storage.folders import replace_folder
from memorizing.storage.locks import LOCK, hold_lock, is_locked

SMALL_SEGMENT = 16_384
"""Segments that have at most so many entries together are joined."""
LARGEST_JOINED = 2**20
"""Entries up to which larger ones are joined at all."""
MOST_MANIFEST_BYTES = 2**30
"""A manifest has some 300 bytes for every document."""

_Segments = Sequence[SegmentRecord | Sequence[Part]]
"""Of a new state: those that stay, and the parts of new ones."""


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
        check_free(path)
        with _explain_failures(path):
            path.mkdir(parents=True, exist_ok=True)
            with hold_lock(path, MemoryFolderError):
                # Another process may have been faster.
                check_free(path)
                _remove_leftovers(path, manifest)
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
        opened = cls(path, read_contents(path))
        found = opened.description.fingerprint
        if fingerprint is not None and found != fingerprint:
            raise MemoryFolderError(
                f"{path} holds what a model of the fingerprint {found!r} read, and this one has "
                f"{fingerprint!r}; use the model that wrote it, or read the text again"
            )
        # A folder that cannot be written is read as it is.
        with contextlib.suppress(MemoryFolderError, OSError):
            if any(_list_leftovers(path, opened.contents.manifest)) and not is_locked(path):
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
        return cls.open(path) if _list_held(path) else None

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
        check_free(out)
        sources = [read_contents(Path(path)) for path in paths]
        manifest = Manifest(unite_descriptions(sources, settings))
        parts = choose_parts(sources, LARGEST_JOINED)
        with _explain_failures(out), contextlib.ExitStack() as stack:
            out.parent.mkdir(parents=True, exist_ok=True)
            remove_leftovers(out.parent)
            _remove_old_merge(out.with_name(f".{out.name}.part"))
            unfinished = stack.enter_context(name_temporary(out.parent))
            unfinished.mkdir()
            _write_state(unfinished, manifest, parts)
            if out.exists():
                stack.enter_context(hold_lock(out, MemoryFolderError))
                check_free(out)
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
        self.contents = read_contents(self.path, self.contents)

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
            with _explain_failures(self.path):
                stack.enter_context(hold_lock(self.path, MemoryFolderError))
                self.refresh()
                _remove_leftovers(self.path, self.contents.manifest)
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
                self._forget_one_by_one(names)

    def _forget_one_by_one(self, names: Collection[str]) -> None:
        # What failed may have been a step after the manifest was there.
        self.refresh()
        parts: dict[str, list[StoredDocument]] = {}
        for document in self.documents:
            parts.setdefault(document.segment, []).append(document)
        kept = {
            file: sum(one.num_entries for one in documents if one.name not in names)
            for file, documents in parts.items()
            if any(one.name in names for one in documents)
        }
        if not kept:
            raise
        for file in sorted(kept, key=lambda file: kept[file]):
            # What was saved of its entries is not of those that are kept.
            with _explain_failures(self.path):
                remove(self.path / INDEXES / Path(file).stem)
            try:
                self._change({one.name for one in parts[file] if one.name in names})
            except ResourceError as error:
                raise ResourceError(
                    f"{error}; forgetting all {len(parts[file]):,} documents that stand in {file} "
                    "needs no room (`memorizing memory list --json` says which they are)"
                ) from error

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
        with self.lock(), _explain_failures(self.path):
            save_indexes(self.contents, index)

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
        return open_layer(self.contents, layer, device, index, heads)

    def _change(
        self,
        forgotten: Collection[str] = (),
        part: Part | None = None,
        manifest: Manifest | None = None,
    ) -> None:
        """Go to the state without these documents and with a part more; the lock is held."""
        with _explain_failures(self.path):
            segments = plan_change(self.contents, forgotten, part)
            after = _write_state(self.path, manifest or self.contents.manifest, segments)
        self.contents = Contents(self.path, after, self.contents)


def check_free(folder: Path) -> None:
    """Refuse a place for a new memory that holds something already.

    Raises:
        MemoryFolderError: it does.
        ResourceError: it cannot be looked at.
    """
    with _explain_failures(folder):
        held = _list_held(folder)
    if held:
        what = "a memory" if MANIFEST in held else f"other files ({held[0]})"
        raise MemoryFolderError(f"{folder} holds {what} already; open it, or choose a new folder")


def _list_held(folder: Path) -> list[str]:
    """Names in a folder, but for what a writer that was killed left before there was a memory."""
    names = sorted(path.name for path in folder.iterdir()) if folder.exists() else []
    return [name for name in names if name != LOCK and not is_leftover(name, is_locked=True)]


def read_contents(folder: Path, known: Contents | None = None) -> Contents:
    """The state of a folder as it is now, while others may write.

    Args:
        folder: where.
        known: an earlier state, whose mapped files are used again.

    Raises:
        MemoryFolderError: there is no memory, or it is damaged or of another format version.
    """
    manifest = read_manifest(folder)
    while True:
        try:
            return Contents(folder, manifest, known)
        except FileNotFoundError as error:
            # A writer may have replaced the manifest and removed what it does not name.
            now = read_manifest(folder)
            if now == manifest:
                raise MemoryFolderError(
                    f"{error.filename} is missing, and the manifest names it; {ADVICE}"
                ) from error
            manifest = now


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a folder.

    Raises:
        MemoryFolderError: there is none, or it is damaged or of another format version.
    """
    path = folder / MANIFEST
    try:
        return parse_manifest(read_bytes(path, most=MOST_MANIFEST_BYTES, is_link_allowed=False))
    except FileNotFoundError as error:
        raise MemoryFolderError(
            f"{folder} holds no memory: there is no {MANIFEST}; name another folder, or create it"
        ) from error
    except MemoryFolderError as error:
        raise MemoryFolderError(f"{path} is refused: {error}; {ADVICE}") from error
    except OSError as error:
        raise MemoryFolderError(
            f"{path} cannot be read ({describe_failure(error)}); a memory consists of plain files, "
            "no links"
        ) from error


def plan_change(contents: Contents, forgotten: Collection[str], part: Part | None) -> _Segments:
    """The segments of a folder without some documents, and with a part more.

    The last segments are joined with the part where they are small, or not larger than what follows
    them: there are then about as many as the logarithm of the number of entries, and each entry is
    written as often.
    """
    documents = contents.documents
    touched = {one.segment for one in documents if one.name in forgotten}
    segments: list[SegmentRecord | Sequence[Part]] = [
        [segment.take(documents, without=forgotten)]
        if segment.record.file in touched
        else segment.record
        for segment in contents.segments
    ]
    if part is None:
        return segments
    parts, num_entries = [part], part.num_entries
    for segment in reversed(contents.segments):
        last = segment.take(documents, without=forgotten)
        total = last.num_entries + num_entries
        is_joined = last.num_entries <= num_entries or total <= SMALL_SEGMENT
        if not is_joined or total > LARGEST_JOINED:
            break
        parts.insert(0, last)
        num_entries = total
        segments.pop()
    return [*segments, parts]


def _write_state(folder: Path, before: Manifest, segments: _Segments) -> Manifest:
    """Write new segments, then the manifest that names them; remove what it does not name.

    Whoever calls this holds the lock. If it is interrupted, the folder is in the state of before or
    in the new one.
    """
    records: list[SegmentRecord] = []
    documents: list[StoredDocument] = []
    number = before.next_segment
    try:
        for segment in segments:
            if isinstance(segment, SegmentRecord):
                records.append(segment)
                documents += [one for one in before.documents if one.segment == segment.file]
                continue
            parts = [part for part in segment if part.documents]
            if parts:
                record, numbered = write_segment(folder, number, before.description, parts)
                records.append(record)
                documents += numbered
                number += 1
        after = replace(
            before, segments=tuple(records), documents=tuple(documents), next_segment=number
        )
        write_bytes(folder / MANIFEST, format_manifest(after))
    except BaseException:
        # By the manifest that is there: the error may have come after it was replaced.
        with contextlib.suppress(Exception):
            _remove_leftovers(folder, read_manifest(folder))
        raise
    _remove_leftovers(folder, after)
    return after


def _list_leftovers(folder: Path, manifest: Manifest) -> Iterator[Path]:
    """What no manifest names: temporary files, segments, indexes of these. Not what is not ours."""
    named = {segment.file for segment in manifest.segments}
    for path in folder.iterdir():
        is_unnamed = SEGMENT_NAME.fullmatch(path.name) and path.name not in named
        if is_unnamed or is_leftover(path.name, is_locked=True):
            yield path
    indexes = folder / INDEXES
    for path in indexes.iterdir() if indexes.is_dir() and not indexes.is_symlink() else ():
        file = f"{path.name}.safetensors"
        if not path.is_dir() or path.is_symlink() or not SEGMENT_NAME.fullmatch(file):
            continue
        if file not in named:
            yield path
        else:
            yield from (one for one in path.iterdir() if is_leftover(one.name, is_locked=True))


def _remove_leftovers(folder: Path, manifest: Manifest) -> None:
    """Remove what writers of before left. Whoever calls this holds the lock."""
    for path in list(_list_leftovers(folder, manifest)):
        remove(path)


def _remove_old_merge(unfinished: Path) -> None:
    """Remove what releases before 0.9 left of a merge that was killed, and nothing else."""
    if not unfinished.is_dir() or unfinished.is_symlink() or is_locked(unfinished):
        return
    names = [path.name for path in unfinished.iterdir()]
    if all(
        name in (LOCK, MANIFEST)
        or SEGMENT_NAME.fullmatch(name)
        or is_leftover(name, is_locked=True)
        for name in names
    ):
        remove(unfinished)


def _explain_failures(folder: Path) -> contextlib.AbstractContextManager[None]:
    return explain_failures(f"the memory {folder}")
