"""From one state of a folder to the next, and back from disk."""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from memorizing.errors import MemoryFolderError
from memorizing.memory.disk.contents import Contents
from memorizing.memory.disk.layout import plan_segment
from memorizing.memory.disk.lock import LOCK, hold_lock
from memorizing.memory.disk.manifest import Manifest, SegmentRecord, StoredDocument
from memorizing.memory.disk.manifest_file import format_manifest, parse_manifest
from memorizing.memory.disk.parts import Part, iterate_content, number_documents, take_part
from memorizing.memory.disk.segment import PLAIN_FILE
from memorizing.memory.disk.writing import (
    MANIFEST,
    explain_failures,
    is_temporary,
    remove_leftovers,
    sync_folder,
    write_whole,
)

SMALL_SEGMENT = 16_384
"""Segments that have at most so many entries together are joined."""
LARGEST_JOINED = 2**20
"""Entries up to which larger ones are joined at all."""


def check_free(folder: Path) -> None:
    """Refuse a place for a new memory that holds something already.

    Raises:
        MemoryFolderError: it does.
        ResourceError: it cannot be looked at.
    """
    with explain_failures(folder):
        names = sorted(path.name for path in folder.iterdir()) if folder.exists() else []
    held = [name for name in names if name != LOCK and not is_temporary(name)]
    if held:
        what = "a memory" if MANIFEST in held else f"other files ({held[0]})"
        raise MemoryFolderError(f"{folder} holds {what} already; open it, or choose a new folder")


def create_state(folder: Path, manifest: Manifest) -> None:
    """Write the manifest of a new memory without entries.

    Raises:
        MemoryFolderError: the folder holds something, or is being written.
        ResourceError: it cannot be written.
    """
    check_free(folder)
    with explain_failures(folder):
        folder.mkdir(parents=True, exist_ok=True)
        with hold_lock(folder):
            # Another process may have been faster.
            check_free(folder)
            remove_leftovers(folder, manifest)
            write_whole(folder / MANIFEST, [format_manifest(manifest)])
        sync_folder(folder.parent)


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a folder.

    Raises:
        MemoryFolderError: there is none, or it is damaged or of another format version.
    """
    path = folder / MANIFEST
    try:
        return parse_manifest(_read_small_file(path))
    except FileNotFoundError as error:
        raise MemoryFolderError(
            f"{folder} holds no memory: there is no {MANIFEST}; name another folder, or create it"
        ) from error
    except MemoryFolderError as error:
        raise MemoryFolderError(
            f"{path} is refused: {error}; use another copy of the memory, or read the text again"
        ) from error
    except OSError as error:
        raise MemoryFolderError(
            f"{path} cannot be read ({error.strerror}); a memory consists of plain files, no links"
        ) from error


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
                    f"{error.filename} is missing, and the manifest names it; use another copy of "
                    "the memory, or read the text again"
                ) from error
            manifest = now


def plan_append(contents: Contents, part: Part) -> list[SegmentRecord | Sequence[Part]]:
    """The segments of a folder with a part more; the last ones are joined with it.

    Segments that are small, or not larger than what follows them, are joined: there are then about
    as many as the logarithm of the number of entries, and each entry is written as often.
    """
    manifest = contents.manifest
    num_entries = sum(document.num_entries for document in part.documents)
    parts, num_kept = [part], len(manifest.segments)
    for segment in reversed(contents.segments):
        last = segment.record.num_entries
        is_joined = last <= num_entries or last + num_entries <= SMALL_SEGMENT
        if not is_joined or last + num_entries > LARGEST_JOINED:
            break
        parts.insert(0, take_part(segment, manifest.documents))
        num_entries += last
        num_kept -= 1
    return [*manifest.segments[:num_kept], parts]


def write_state(
    folder: Path, before: Manifest, segments: Sequence[SegmentRecord | Sequence[Part]]
) -> Manifest:
    """Write new segments, then the manifest that names them; remove what it does not name.

    Whoever calls this holds the lock. If it is interrupted, the folder is in the state of before or
    in the new one.

    Args:
        folder: where.
        before: the manifest that is there.
        segments: of the new state: those that stay, and the parts of new ones.

    Raises:
        OSError: something cannot be written.
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
                record, numbered = _write_segment(folder, number, before, parts)
                records.append(record)
                documents += numbered
                number += 1
        after = replace(
            before, segments=tuple(records), documents=tuple(documents), next_segment=number
        )
        write_whole(folder / MANIFEST, [format_manifest(after)])
    except BaseException:
        # By the manifest that is there: the error may have come after it was replaced.
        with contextlib.suppress(Exception):
            remove_leftovers(folder, read_manifest(folder))
        raise
    remove_leftovers(folder, after)
    return after


def _write_segment(
    folder: Path, number: int, manifest: Manifest, parts: Sequence[Part]
) -> tuple[SegmentRecord, tuple[StoredDocument, ...]]:
    file = f"segment-{number:06d}.safetensors"
    counts, documents = number_documents(parts, file)
    layout = plan_segment(manifest.description, counts)
    sha256 = write_whole(folder / file, iterate_content(parts, layout))
    record = SegmentRecord(
        file,
        counts.num_entries,
        counts.num_spans,
        counts.num_text_bytes,
        layout.num_bytes,
        sha256,
    )
    return record, documents


def _read_small_file(path: Path) -> bytes:
    """The content of a plain file that is no link."""
    with open(os.open(path, PLAIN_FILE), "rb") as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise MemoryFolderError("it is no file")
        return file.read()
