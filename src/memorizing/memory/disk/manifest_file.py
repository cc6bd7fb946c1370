"""The manifest of a memory folder: one JSON file, which is replaced whole.

Everything that is read from it is checked before it is used; it also holds its own checksum.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from typing import Any

from memorizing.errors import MemoryFolderError
from memorizing.memory.disk.description import FolderDescription
from memorizing.memory.disk.manifest import SEGMENT_NAME, Manifest, SegmentRecord, StoredDocument

_FORMAT = "memorizing memory"
_VERSION = 1

_SHA256 = re.compile(r"[0-9a-f]{64}")
_MOST = 2**53
"""Numbers up to here are whole in every reader of JSON."""
_SEGMENT_KEYS = {field.name for field in dataclasses.fields(SegmentRecord)}
_DOCUMENT_KEYS = {field.name for field in dataclasses.fields(StoredDocument)}


def format_manifest(manifest: Manifest) -> bytes:
    """The content of the file: JSON, a line for every segment and document."""
    values = {
        "format": _FORMAT,
        "version": _VERSION,
        **dataclasses.asdict(manifest.description),
        "next_segment": manifest.next_segment,
        "segments": [vars(segment) for segment in manifest.segments],
        "documents": [vars(document) for document in manifest.documents],
    }
    values["checksum"] = hash_values(values)
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
    """Read what `format_manifest` gave.

    Raises:
        MemoryFolderError: it is damaged, was edited, or is of another format version.
    """
    try:
        values = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise MemoryFolderError(f"it is not JSON ({error})") from error
    if not isinstance(values, dict) or values.get("format") != _FORMAT:
        raise MemoryFolderError("it is not that of a memory")
    if values.get("version") != _VERSION:
        raise MemoryFolderError(
            f"it is of format version {values.get('version')!r}, and this version of memorizing "
            f"reads {_VERSION}; use the version that wrote it"
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
    if set(values) != {"format", "version", "next_segment", "segments", "documents", *fields}:
        raise _describe_nonsense(f"its keys are {sorted(values)}")
    for name in ("layers", "segments", "documents"):
        if not isinstance(values[name], list):
            raise _describe_nonsense(f"its {name} are no list")
    if not _is_count(values["next_segment"]):
        raise _describe_nonsense(f"next_segment is {values['next_segment']!r}")
    return Manifest(
        FolderDescription(**{name: values[name] for name in fields}),
        tuple(_build_segment(line) for line in values["segments"]),
        tuple(_build_document(line) for line in values["documents"]),
        values["next_segment"],
    )


def _build_segment(line: Any) -> SegmentRecord:
    if not (
        isinstance(line, dict)
        and set(line) == _SEGMENT_KEYS
        and isinstance(line["file"], str)
        and SEGMENT_NAME.fullmatch(line["file"])
        and all(_is_count(line[key]) for key in _SEGMENT_KEYS if key.startswith("num_"))
        and is_hash(line["sha256"])
    ):
        raise _describe_nonsense(f"a segment is {line!r}")
    return SegmentRecord(**line)


def _build_document(line: Any) -> StoredDocument:
    if not (
        isinstance(line, dict)
        and line.keys() == _DOCUMENT_KEYS
        and isinstance(line["name"], str)
        and isinstance(line["segment"], str)
        and _is_count(line["num_tokens"])
        and _is_count(line["num_entries"])
        and _is_count(line["first_entry"])
        and is_hash(line["sha256"])
        and _is_range(line["text"])
        and _is_range(line["spans"])
    ):
        raise _describe_nonsense(f"a document is {line!r}")
    for name in ("text", "spans"):
        line[name] = None if line[name] is None else tuple(line[name])
    return StoredDocument(**line)


def _is_range(part: Any) -> bool:
    return part is None or (
        isinstance(part, list)
        and len(part) == 2
        and all(map(_is_count, part))
        and part[0] <= part[1]
    )


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < _MOST


def is_hash(value: Any) -> bool:
    """Whether this is a SHA-256 as it is written in a manifest."""
    return isinstance(value, str) and bool(_SHA256.fullmatch(value))


def _describe_nonsense(seen: str) -> MemoryFolderError:
    return MemoryFolderError(f"{seen}, which no version of memorizing writes")
