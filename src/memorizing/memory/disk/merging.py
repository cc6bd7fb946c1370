"""What one new memory of several consists of. Entries are copied as they are stored."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from memorizing.errors import MemoryFolderError
from memorizing.memory.disk.contents import Contents
from memorizing.memory.disk.manifest import FolderDescription, StoredDocument
from memorizing.memory.disk.segment import Part


def unite_descriptions(
    sources: Sequence[Contents], settings: Mapping[str, Any] | None
) -> FolderDescription:
    """The description of all together.

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


def choose_parts(sources: Sequence[Contents], most_entries: int) -> list[list[Part]]:
    """Parts that become a segment each, of about `most_entries` at most.

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
            if not groups or num_entries + part.num_entries > most_entries:
                groups.append([])
                num_entries = 0
            groups[-1].append(part)
            num_entries += part.num_entries
    return groups
