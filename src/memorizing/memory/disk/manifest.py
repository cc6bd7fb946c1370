"""A state of a memory folder: what its segments hold, whose entries they are; in one JSON file.

Everything that is read from the file is checked before it is used; it also holds its own checksum.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import groupby, pairwise
from typing import Any

import torch

from memorizing.errors import MemoryFolderError
from memorizing.storage.files import parse_json
from memorizing.storage.tensors import FLOAT_DTYPES

MANIFEST = "manifest.json"
SEGMENT_NAME = re.compile(r"segment-([0-9]{6,12})\.safetensors")
"""What a segment file may be called: a name in the folder itself."""
DTYPES = {**FLOAT_DTYPES, "int8": torch.int8}
"""How entries may be stored, by name."""

_FORMAT = "memorizing memory"
_VERSION = 1
_SHA256 = re.compile(r"[0-9a-f]{64}")
_MOST = 2**53
"""Numbers up to here are whole in every reader of JSON."""

_Checks = dict[str, Callable[[Any], bool]]


@dataclass(frozen=True)
class FolderDescription:
    """The model whose entries a folder holds, and their shape; fixed when it is created.

    Raises:
        MemoryFolderError: a value that is not allowed.
    """

    fingerprint: str
    """Of everything that stored entries depend on. Made by the caller, compared as it is."""
    layers: tuple[int, ...]
    """Layers of the model that have entries, ascending."""
    num_heads: int
    """H, heads of keys."""
    head_dim: int
    """D."""
    dtype: str = "bfloat16"
    """A name of `DTYPES`. With int8, every key and value has a factor of its own beside its codes:
    half of the bytes of bfloat16, and an error of at most max |x| / 254 in each number."""
    settings: dict[str, Any] = field(default_factory=dict)
    """What else the caller keeps with the entries; JSON."""

    def __post_init__(self) -> None:
        """Refuse what cannot work; layers become a tuple, settings what JSON gives back."""
        object.__setattr__(self, "layers", tuple(self.layers))
        is_text = isinstance(self.fingerprint, str) and bool(self.fingerprint)
        is_ascending = all(map(is_count, self.layers)) and list(self.layers) == sorted(
            set(self.layers)
        )
        is_dtype = isinstance(self.dtype, str) and self.dtype in DTYPES
        for name, is_allowed, allowed in (
            ("fingerprint", is_text, "a text that is not empty"),
            ("layers", self.layers and is_ascending, "one number or more, from 0, ascending"),
            ("num_heads", is_count(self.num_heads) and self.num_heads, "1 or more"),
            ("head_dim", is_count(self.head_dim) and self.head_dim, "1 or more"),
            ("dtype", is_dtype, ", ".join(DTYPES)),
            ("settings", isinstance(self.settings, dict), "a dict"),
        ):
            if not is_allowed:
                raise MemoryFolderError(
                    f"{name} of a memory is {getattr(self, name)!r}; allowed: {allowed}"
                )
        try:
            settings = json.loads(json.dumps(self.settings, allow_nan=False))
        except (TypeError, ValueError, RecursionError) as error:
            raise MemoryFolderError(
                f"settings of a memory are not JSON ({error}); use numbers that are finite, texts, "
                "lists and dicts"
            ) from error
        object.__setattr__(self, "settings", settings)

    @property
    def stored_dtype(self) -> torch.dtype:
        """Of the stored numbers."""
        return DTYPES[self.dtype]

    @property
    def searched_dtype(self) -> torch.dtype:
        """Of the keys that are searched: of int8 entries, bfloat16."""
        return torch.bfloat16 if self.dtype == "int8" else self.stored_dtype

    @property
    def bytes_per_entry(self) -> int:
        """Bytes of keys and values in all layers."""
        factor_bytes = 4 if self.dtype == "int8" else 0
        per_vector = self.head_dim * self.stored_dtype.itemsize + factor_bytes
        return 2 * len(self.layers) * self.num_heads * per_vector


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
        if len({document.name for document in self.documents}) < len(self.documents):
            raise MemoryFolderError("a document is named twice")
        files = [segment.file for segment in self.segments]
        parts = [
            (file, list(documents))
            for file, documents in groupby(self.documents, lambda document: document.segment)
        ]
        if [file for file, _ in parts] != files or len(set(files)) < len(files):
            raise MemoryFolderError(
                "a segment is named twice, or documents do not stand in the order of the segments"
            )
        for segment, (file, documents) in zip(self.segments, parts, strict=True):
            found = SEGMENT_NAME.fullmatch(file)
            if found is None or int(found[1]) >= self.next_segment:
                raise MemoryFolderError(f"{file!r} is not below next_segment, {self.next_segment}")
            _check_documents(segment, documents)

    @property
    def num_entries(self) -> int:
        """Of all documents."""
        return sum(segment.num_entries for segment in self.segments)


def _check_documents(segment: SegmentRecord, documents: list[StoredDocument]) -> None:
    """Every entry, line of spans and byte of text belongs to one document, in their order."""
    for what, total, ranges in (
        (
            "entries",
            segment.num_entries,
            [(one.entries.start, one.entries.stop) for one in documents],
        ),
        ("spans", segment.num_spans, [one.spans for one in documents if one.spans]),
        ("text", segment.num_text_bytes, [one.text for one in documents if one.text]),
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
    lines = []
    for key, value in values.items():
        text = json.dumps(value, allow_nan=False)
        if key in ("segments", "documents"):
            text = "[\n{}\n]".format(",\n".join(map(json.dumps, value)))
        lines.append(f"{json.dumps(key)}: {text}")
    return "{{\n{}\n}}\n".format(",\n".join(lines)).encode()


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
        values = parse_json(content)
        if values.get("format") != _FORMAT:
            raise MemoryFolderError("it is not that of a memory")
        if values.get("version") != _VERSION:
            raise MemoryFolderError(
                f"it is of format version {values.get('version')!r}, and this version of "
                f"memorizing reads {_VERSION}; use the version that wrote it"
            )
        checksum = hash_values(values)
    except (ValueError, RecursionError) as error:
        raise MemoryFolderError(str(error)) from error
    if values.pop("checksum", None) != checksum:
        raise MemoryFolderError("its checksum is not that of its content: it was altered")
    names = {one.name for one in dataclasses.fields(FolderDescription)}
    if values.keys() != {"format", "version", "next_segment", "segments", "documents", *names}:
        raise _describe_nonsense(f"its keys are {sorted(values)}")
    lists = [values[name] for name in ("layers", "segments", "documents")]
    if not all(isinstance(one, list) for one in lists) or not is_count(values["next_segment"]):
        raise _describe_nonsense("its layers, segments or documents are no lists, or their number")
    for line in values["segments"]:
        _check(line, _list_checks(SegmentRecord), "a segment")
    checks = _list_checks(StoredDocument)
    for line in values["documents"]:
        _check(line, checks, "a document")
        for name in ("text", "spans"):
            line[name] = line[name] and tuple(line[name])
    return Manifest(
        FolderDescription(**{name: values[name] for name in names}),
        tuple(SegmentRecord(**line) for line in values["segments"]),
        tuple(StoredDocument(**line) for line in values["documents"]),
        values["next_segment"],
    )


def is_count(value: Any) -> bool:
    """Whether this is a whole number from 0."""
    return type(value) is int and 0 <= value < _MOST


def is_hash(value: Any) -> bool:
    """Whether this is a SHA-256 as it is written in a manifest."""
    return isinstance(value, str) and bool(_SHA256.fullmatch(value))


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_range(value: Any) -> bool:
    match value:
        case None:
            return True
        case [start, stop]:
            return is_count(start) and is_count(stop) and start <= stop
    return False


_KINDS: dict[Any, Callable[[Any], bool]] = {
    "int": is_count,
    "str": _is_text,
    "tuple[int, int] | None": _is_range,
}


def _list_checks(kind: type[SegmentRecord] | type[StoredDocument]) -> _Checks:
    """What the value of every field must be."""
    fields = dataclasses.fields(kind)
    return {one.name: is_hash if one.name == "sha256" else _KINDS[one.type] for one in fields}


def _check(line: Any, checks: _Checks, what: str) -> None:
    if not isinstance(line, dict) or line.keys() != checks.keys():
        raise _describe_nonsense(f"{what} is {line!r}")
    for key, is_allowed in checks.items():
        if not is_allowed(line[key]):
            raise _describe_nonsense(f"{what} has {key} {line[key]!r}")


def _describe_nonsense(seen: str) -> MemoryFolderError:
    return MemoryFolderError(f"{seen[:200]}, which no version of memorizing writes")
