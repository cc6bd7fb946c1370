"""The manifest of a memory folder: what it holds, as one JSON file that is replaced whole.

Everything that is read from it is checked before it is used; it also holds its own checksum.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from memorizing.errors import MemoryFolderError
from memorizing.memory.disk.description import FolderDescription
from memorizing.memory.disk.layout import Counts, plan_segment

FORMAT = "memorizing memory"
VERSION = 1
SEGMENT_NAME = re.compile(r"segment-[0-9]{6,12}\.safetensors")

_SHA256 = re.compile(r"[0-9a-f]{64}")
_MOST = 2**53
"""Numbers up to here are whole in every reader of JSON."""


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

    def to_json(self) -> bytes:
        """The content of the file."""
        values = {
            "format": FORMAT,
            "version": VERSION,
            **dataclasses.asdict(self.description),
            "next_segment": self.next_segment,
            "segments": [vars(segment) for segment in self.segments],
            "documents": [vars(document) for document in self.documents],
        }
        values["checksum"] = hash_values(values)
        # A line for every segment and document.
        lines = [
            f"{json.dumps(key)}: [\n{_join_lines(value)}\n]"
            if key in ("segments", "documents")
            else f"{json.dumps(key)}: {json.dumps(value, allow_nan=False)}"
            for key, value in values.items()
        ]
        return "{{\n{}\n}}\n".format(",\n".join(lines)).encode()


def _join_lines(values: list[dict[str, Any]]) -> str:
    return ",\n".join(map(json.dumps, values))


def hash_values(values: dict[str, Any]) -> str:
    """SHA-256 of everything in a manifest but its checksum."""
    rest = {key: value for key, value in values.items() if key != "checksum"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True, allow_nan=False).encode()).hexdigest()


def parse_manifest(content: bytes) -> Manifest:
    """Read what `to_json` gave.

    Raises:
        MemoryFolderError: it is damaged, was edited, or is of another format version.
    """
    try:
        values = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise MemoryFolderError(f"it is not JSON ({error})") from error
    if not isinstance(values, dict) or values.get("format") != FORMAT:
        raise MemoryFolderError("it is not that of a memory")
    if values.get("version") != VERSION:
        raise MemoryFolderError(
            f"it is of format version {values.get('version')!r}, and this version of memorizing "
            f"reads {VERSION}; use the version that wrote it"
        )
    try:
        checksum = hash_values(values)
    except (ValueError, RecursionError) as error:
        raise MemoryFolderError(f"it holds what JSON cannot ({error})") from error
    if values.pop("checksum", None) != checksum:
        raise MemoryFolderError("its checksum is not that of its content: it was altered")
    return _build_manifest(values)


def _build_manifest(values: dict[str, Any]) -> Manifest:
    fields = {field.name for field in dataclasses.fields(FolderDescription)}
    expected = {"format", "version", "next_segment", "segments", "documents", *fields}
    _require(set(values) == expected, f"its keys are {sorted(values)}")
    _require(isinstance(values["layers"], list), "its layers are no list")
    _require(_is_count(values["next_segment"]), "next_segment is no count")
    for name in ("segments", "documents"):
        _require(isinstance(values[name], list), f"its {name} are no list")
    return Manifest(
        FolderDescription(**{name: values[name] for name in fields}),
        tuple(_build_segment(line) for line in values["segments"]),
        tuple(_build_document(line) for line in values["documents"]),
        values["next_segment"],
    )


def _build_segment(line: Any) -> SegmentRecord:
    fields = [field.name for field in dataclasses.fields(SegmentRecord)]
    _require(isinstance(line, dict) and set(line) == set(fields), f"a segment is {line!r}")
    _require(
        isinstance(line["file"], str) and bool(SEGMENT_NAME.fullmatch(line["file"])),
        f"a segment is named {line['file']!r}",
    )
    counts = [line[name] for name in fields if name.startswith("num_")]
    _require(all(map(_is_count, counts)) and is_hash(line["sha256"]), f"a segment is {line!r}")
    return SegmentRecord(**line)


def _build_document(line: Any) -> StoredDocument:
    fields = {field.name for field in dataclasses.fields(StoredDocument)}
    _require(isinstance(line, dict) and set(line) == fields, f"a document is {line!r}")
    counts = [line[name] for name in ("num_tokens", "num_entries", "first_entry")]
    _require(
        isinstance(line["name"], str)
        and isinstance(line["segment"], str)
        and all(map(_is_count, counts))
        and is_hash(line["sha256"]),
        f"a document is {line!r}",
    )
    for name in ("text", "spans"):
        part = line[name]
        is_range = isinstance(part, list) and len(part) == 2 and all(map(_is_count, part))
        _require(part is None or (is_range and part[0] <= part[1]), f"a document is {line!r}")
        line[name] = None if part is None else tuple(part)
    return StoredDocument(**line)


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


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < _MOST


def is_hash(value: Any) -> bool:
    """Whether this is a SHA-256 as it is written in a manifest."""
    return isinstance(value, str) and bool(_SHA256.fullmatch(value))


def _require(is_so: bool, otherwise: str) -> None:
    if not is_so:
        raise MemoryFolderError(f"{otherwise}, which no version of memorizing writes")
