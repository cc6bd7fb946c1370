"""One new memory of several. Entries are copied as they are stored; nothing is rounded again."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from memorizing.errors import MemoryFolderError
from memorizing.memory.disk.contents import Contents
from memorizing.memory.disk.description import FolderDescription
from memorizing.memory.disk.lock import LOCK, hold_lock
from memorizing.memory.disk.manifest import Manifest, StoredDocument
from memorizing.memory.disk.parts import Part
from memorizing.memory.disk.state import LARGEST_JOINED, check_free, read_contents, write_state
from memorizing.memory.disk.writing import (
    TEMPORARY,
    explain_failures,
    remove_ours,
    sync_folder,
)


def merge_folders(
    paths: Sequence[Path], out: Path, settings: Mapping[str, Any] | None = None
) -> None:
    """Write a new folder; see `MemoryFolder.merge`."""
    if not paths:
        raise MemoryFolderError("no memory to merge was named; name one or more")
    check_free(out)
    sources = [read_contents(path) for path in paths]
    description = _unite(paths, [source.manifest.description for source in sources], settings)
    documents = _choose_documents(paths, sources)
    unfinished = out.with_name(f".{out.name}{TEMPORARY}")
    with explain_failures(out):
        unfinished.mkdir(parents=True, exist_ok=True)
        with hold_lock(unfinished):
            # What a merge left that was killed.
            remove_ours(unfinished)
            try:
                write_state(unfinished, Manifest(description), _group(sources, documents))
                if out.exists():
                    _remove_leftovers_of_create(out)
                os.replace(unfinished, out)
            except BaseException:
                with contextlib.suppress(OSError):
                    remove_ours(unfinished)
                    (unfinished / LOCK).unlink()
                    unfinished.rmdir()
                raise
        sync_folder(out.parent)


def _remove_leftovers_of_create(out: Path) -> None:
    check_free(out)
    for path in out.iterdir():
        path.unlink()


def _unite(
    paths: Sequence[Path],
    descriptions: Sequence[FolderDescription],
    settings: Mapping[str, Any] | None,
) -> FolderDescription:
    """The description of all together."""
    first = descriptions[0]
    for path, other in zip(paths, descriptions, strict=True):
        for name in ("fingerprint", "layers", "num_heads", "head_dim", "dtype"):
            mine, theirs = getattr(first, name), getattr(other, name)
            if mine != theirs:
                raise MemoryFolderError(
                    f"{paths[0]} has {name} {mine!r} and {path} has {theirs!r}; only memories of "
                    "one model that are stored alike can be merged"
                )
        if settings is None and other.settings != first.settings:
            raise MemoryFolderError(
                f"{paths[0]} and {path} have different settings; say which the merged memory shall "
                "have (settings=...)"
            )
    return first if settings is None else replace(first, settings=dict(settings))


def _choose_documents(
    paths: Sequence[Path], sources: Sequence[Contents]
) -> list[list[StoredDocument]]:
    """Per source, the documents that are taken: of the same name and text, the first."""
    seen: dict[str, tuple[Path, StoredDocument]] = {}
    chosen: list[list[StoredDocument]] = []
    for path, source in zip(paths, sources, strict=True):
        chosen.append([])
        for document in source.documents:
            if document.name not in seen:
                seen[document.name] = (path, document)
                chosen[-1].append(document)
            elif seen[document.name][1].sha256 != document.sha256:
                raise MemoryFolderError(
                    f"{seen[document.name][0]} and {path} have both a document "
                    f"{document.name!r}, with different texts; forget it in one of them"
                )
    return chosen


def _group(
    sources: Sequence[Contents], documents: Sequence[Sequence[StoredDocument]]
) -> list[list[Part]]:
    """Parts that become a segment each."""
    groups: list[list[Part]] = []
    num_entries = 0
    for source, chosen in zip(sources, documents, strict=True):
        for segment in source.segments:
            kept = [one for one in chosen if one.segment == segment.record.file]
            count = sum(document.num_entries for document in kept)
            if not groups or num_entries + count > LARGEST_JOINED:
                groups.append([])
                num_entries = 0
            groups[-1].append(Part(tuple(kept), segment.get_tensor))
            num_entries += count
    return groups
