"""From one state of a folder to the next, and back from disk.

Whoever writes holds the lock. A writer that is interrupted leaves the state of before or the new
one, and perhaps files that no manifest names, which are removed when the folder is opened next.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from memorizing.errors import MemoryFolderError
from memorizing.memory.disk.contents import Contents
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
from memorizing.memory.disk.segment import (
    ADVICE,
    Moved,
    Part,
    SegmentFile,
    explain_reading,
    move_segment,
    write_segment,
)
from memorizing.storage.files import explain_failures, is_leftover, read_bytes, remove, write_bytes
from memorizing.storage.locks import LOCK, is_locked

INDEXES = "index"
"""Folder of what indexes saved: index/segment-<n>/<layer>-<settings>."""
SMALL_SEGMENT = 16_384
"""Segments that have at most so many entries together are joined."""
LARGEST_JOINED = 2**20
"""Entries up to which larger ones are joined at all."""

_MOST_MANIFEST_BYTES = 2**30
"""A manifest has some 300 bytes for every document."""

Segments = Iterable[SegmentRecord | Sequence[Part] | Moved]
"""Of a new state: those that stay, the parts of new ones, and what is moved here as it is."""


def list_held(folder: Path) -> list[str]:
    """Names in a folder, but for what a writer that was killed left before there was a memory."""
    names = sorted(path.name for path in folder.iterdir()) if folder.exists() else []
    return [name for name in names if name != LOCK and not is_leftover(name, is_locked=True)]


def check_free(folder: Path) -> None:
    """Refuse a place for a new memory that holds something already.

    Raises:
        MemoryFolderError: it does.
        ResourceError: it cannot be looked at.
    """
    with explain_failures(f"the memory {folder}"):
        held = list_held(folder)
    if held:
        what = "a memory" if MANIFEST in held else f"other files ({held[0]})"
        raise MemoryFolderError(f"{folder} holds {what} already; open it, or choose a new folder")


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
        with explain_reading(path):
            content = read_bytes(path, most=_MOST_MANIFEST_BYTES, is_link_allowed=False)
    except FileNotFoundError as error:
        raise MemoryFolderError(
            f"{folder} holds no memory: there is no {MANIFEST}; name another folder, or create it"
        ) from error
    try:
        return parse_manifest(content)
    except MemoryFolderError as error:
        raise MemoryFolderError(f"{path} is refused: {error}; {ADVICE}") from error


def plan_change(
    contents: Contents,
    forgotten: Collection[str],
    part: Part | None,
    moved: SegmentFile | None = None,
) -> Segments:
    """The segments of a folder without some documents, and with a part more.

    The last segments are joined with the part where they are small, or not larger than what follows
    them: there are then about as many as the logarithm of the number of entries, and each entry is
    written as often.

    Args:
        contents: of the folder.
        forgotten: names of the documents.
        part: what is added.
        moved: the file of another folder that is this part, and moved where nothing is joined.
    """
    touched = {one.segment for one in contents.documents if one.name in forgotten}
    kept = [segment.take(contents.documents, without=forgotten) for segment in contents.segments]
    segments: list[SegmentRecord | Sequence[Part] | Moved] = [
        [one] if segment.record.file in touched else segment.record
        for segment, one in zip(contents.segments, kept, strict=True)
    ]
    if part is None:
        return segments
    parts, total = [part], part.num_entries
    for last in reversed(kept):
        is_joined = last.num_entries <= total or last.num_entries + total <= SMALL_SEGMENT
        if not is_joined or last.num_entries + total > LARGEST_JOINED:
            break
        parts.insert(0, last)
        total += last.num_entries
        segments.pop()
    if moved is not None and len(parts) == 1:
        return [*segments, Moved(moved, part)]
    return [*segments, parts]


def write_state(folder: Path, before: Manifest, segments: Segments) -> Manifest:
    """Write new segments, then the manifest that names them; remove what it does not name.

    Raises:
        ResourceError: something cannot be written.
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
            if isinstance(segment, Moved):
                record, numbered = move_segment(folder, number, segment)
            elif parts := [part for part in segment if part.documents]:
                record, numbered = write_segment(folder, number, before.description, parts)
            else:
                continue
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
            remove_unnamed(folder, read_manifest(folder))
        raise
    remove_unnamed(folder, after)
    return after


def list_unnamed(folder: Path, manifest: Manifest) -> Iterator[Path]:
    """What no manifest names: temporary files, segments, indexes of these. Not what is not ours."""
    named = {segment.file for segment in manifest.segments}
    folders = [folder, folder / INDEXES]
    folders += [folder / INDEXES / Path(file).stem for file in named]
    for path in folders:
        for one in path.iterdir() if path.is_dir() and not path.is_symlink() else ():
            file = one.name if path == folder else f"{one.name}.safetensors"
            is_unnamed = SEGMENT_NAME.fullmatch(file) and file not in named
            if is_unnamed or is_leftover(one.name, is_locked=True):
                yield one


def remove_unnamed(folder: Path, manifest: Manifest) -> None:
    """Remove what writers of before left, and what they forgot."""
    for path in list(list_unnamed(folder, manifest)):
        remove(path)


def remove_old_merge(unfinished: Path) -> None:
    """Remove what earlier releases left of a merge that was killed, and nothing else."""
    if unfinished.is_dir() and not unfinished.is_symlink() and not is_locked(unfinished):
        held = list_held(unfinished)
        if all(name == MANIFEST or SEGMENT_NAME.fullmatch(name) for name in held):
            remove(unfinished)


def unite_descriptions(
    sources: Sequence[Contents], settings: Mapping[str, Any] | None
) -> FolderDescription:
    """The description of several memories together.

    Raises:
        MemoryFolderError: they are of different models or shapes; or have different settings, and
            none are given.
    """
    first = sources[0].manifest.description
    for source in sources:
        other = source.manifest.description
        for name in ("fingerprint", "layers", "num_heads", "head_dim", "dtype"):
            mine, theirs = getattr(first, name), getattr(other, name)
            if mine != theirs:
                raise MemoryFolderError(
                    f"{sources[0].folder} has {name} {mine!r} and {source.folder} has {theirs!r}; "
                    "only memories of one model that are stored alike can be merged"
                )
        if settings is None and other.settings != first.settings:
            raise MemoryFolderError(
                f"{sources[0].folder} and {source.folder} have different settings; say which the "
                "merged memory shall have (settings=...)"
            )
    return first if settings is None else replace(first, settings=dict(settings))


def choose_parts(sources: Sequence[Contents]) -> list[list[Part]]:
    """Parts of several memories that become a segment of one each.

    Of documents of the same name and text, the first is taken.

    Raises:
        MemoryFolderError: documents of one name have different texts.
    """
    seen: dict[str, tuple[Contents, StoredDocument]] = {}
    groups: list[list[Part]] = []
    num_entries = 0
    for source in sources:
        without = set()
        for document in source.documents:
            owner, known = seen.setdefault(document.name, (source, document))
            if known.sha256 != document.sha256:
                raise MemoryFolderError(
                    f"{owner.folder} and {source.folder} have both a document {document.name!r}, "
                    "with different texts; forget it in one of them"
                )
            if owner is not source:
                without.add(document.name)
        for segment in source.segments:
            part = segment.take(source.documents, without)
            if not groups or num_entries + part.num_entries > LARGEST_JOINED:
                groups.append([])
                num_entries = 0
            groups[-1].append(part)
            num_entries += part.num_entries
    return groups
