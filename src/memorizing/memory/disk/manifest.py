"""A state of a memory folder: what its segments hold, and whose entries they are."""

from __future__ import annotations

import re
from dataclasses import dataclass
from itertools import pairwise

from memorizing.errors import MemoryFolderError
from memorizing.memory.disk.description import FolderDescription
from memorizing.memory.disk.layout import Counts, plan_segment

SEGMENT_NAME = re.compile(r"segment-[0-9]{6,12}\.safetensors")
"""What a segment file may be called: a name in the folder itself."""


@dataclass(frozen=True)
class StoredDocument:
    """A document that was read. Its entries are consecutive in one segment."""

    name: str
    num_tokens: int
    num_entries: int
    sha256: str
    """Of its text, in UTF-8."""
    segment: str
    """File with its entries."""
    first_entry: int
    """In the segment."""
    text: tuple[int, int] | None = None
    """Bytes of its text in the texts of the segment; None is not kept."""
    spans: tuple[int, int] | None = None
    """Lines of its tokens' characters in the segment; None is not kept."""

    @property
    def entries(self) -> range:
        """Of the segment."""
        return range(self.first_entry, self.first_entry + self.num_entries)


@dataclass(frozen=True)
class SegmentRecord:
    """A segment file as it must be."""

    file: str
    num_entries: int
    num_spans: int
    num_text_bytes: int
    num_bytes: int
    """Of the file."""
    sha256: str
    """Of the file."""

    @property
    def counts(self) -> Counts:
        """What it holds of each kind."""
        return Counts(self.num_entries, self.num_spans, self.num_text_bytes)


@dataclass(frozen=True)
class Manifest:
    """A state of a folder. Segments and documents stand in the order of the entries, oldest first.

    Raises:
        MemoryFolderError: parts that do not fit one another.
    """

    description: FolderDescription
    segments: tuple[SegmentRecord, ...] = ()
    documents: tuple[StoredDocument, ...] = ()
    next_segment: int = 0
    """Number of the segment that is written next. None is used twice."""

    def __post_init__(self) -> None:
        """Refuse parts that do not fit one another."""
        files = [segment.file for segment in self.segments]
        if len(set(files)) < len(files):
            raise MemoryFolderError("a segment is named twice")
        names = {document.name for document in self.documents}
        if len(names) < len(self.documents):
            raise MemoryFolderError("a document is named twice")
        for segment in self.segments:
            _check_segment(segment, self.description, self.next_segment)
        parts: dict[str, list[StoredDocument]] = {file: [] for file in files}
        for document in self.documents:
            if document.segment not in parts:
                raise MemoryFolderError(
                    f"the document {document.name!r} is in {document.segment!r}, which is no "
                    "segment of this folder"
                )
            parts[document.segment].append(document)
        in_order = [document for file in files for document in parts[file]]
        if in_order != list(self.documents):
            raise MemoryFolderError("documents do not stand in the order of their segments")
        for segment in self.segments:
            _check_documents(segment, parts[segment.file])

    @property
    def num_entries(self) -> int:
        """Of all documents."""
        return sum(segment.num_entries for segment in self.segments)


def _check_segment(segment: SegmentRecord, description: FolderDescription, following: int) -> None:
    expected = plan_segment(description, segment.counts).num_bytes
    if segment.num_bytes != expected:
        raise MemoryFolderError(
            f"{segment.file} has {segment.num_bytes:,} bytes, and what it holds takes {expected:,}"
        )
    if int(segment.file.partition("-")[2].partition(".")[0]) >= following:
        raise MemoryFolderError(f"{segment.file} is not below next_segment, {following}")


def _check_documents(segment: SegmentRecord, documents: list[StoredDocument]) -> None:
    """Every entry, line of spans and byte of text belongs to one document, in their order."""
    for what, total, ranges in (
        ("entries", segment.num_entries, [(d.entries.start, d.entries.stop) for d in documents]),
        ("spans", segment.num_spans, [d.spans for d in documents if d.spans]),
        ("text", segment.num_text_bytes, [d.text for d in documents if d.text]),
    ):
        edges = [(0, 0), *ranges, (total, total)]
        if any(before[1] != after[0] for before, after in pairwise(edges)):
            raise MemoryFolderError(f"{what} of {segment.file} are not those of its documents")
    for document in documents:
        spans, text = document.spans, document.text
        if document.num_entries > document.num_tokens or (
            spans is not None and (text is None or spans[1] - spans[0] != document.num_tokens)
        ):
            raise MemoryFolderError(f"the document {document.name!r} has more than its tokens")
