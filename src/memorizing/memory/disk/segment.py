"""A segment: a safetensors file whose header follows from counts, mapped where it is read.

    layers.<layer>.keys           (H, n, D)      entries, oldest first, no position in them
    layers.<layer>.values         (H, n, D)
    layers.<layer>.key_factors    (H, n) fp32    only int8: key = code * factor
    layers.<layer>.value_factors  (H, n) fp32    only int8
    tokens                        (n,) int32     place of every entry's token in its document
    token_spans                   (s, 2) int32   first character, and one after the last, of tokens
                                                 of documents whose text is kept with them
    texts                         (b,) uint8     texts that are kept, UTF-8, one behind the other

A header that is known beforehand is compared as a whole, so that nothing in it has to be trusted.
Segment files never change, so that many processes may map one while others are added. A mapped file
stays readable when its name is gone. Shapes: H heads, n entries, D head_dim.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import math
import mmap
import os
import threading
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from memorizing.errors import MemoryFolderError
from memorizing.knn.int8 import encode_int8
from memorizing.memory.disk.manifest import (
    MANIFEST,
    FolderDescription,
    SegmentRecord,
    StoredDocument,
)
from memorizing.storage.files import describe_failure, open_plain, write_bytes
from memorizing.storage.tensors import TensorLayout, plan_tensors, view_bytes

ADVICE = "use another copy of the memory, or read the text again"

_PART_BYTES = 2**26
"""Of a larger file, no more is kept in a process's memory while it is checked."""
_LET_GO_EVERY = 8
"""Searches, each of which may map 20 MB of files for some entries of them."""
_METADATA = {"format": "memorizing memory segment 1"}


@dataclass(frozen=True)
class Part:
    """Documents, and where their entries, texts and characters are."""

    documents: tuple[StoredDocument, ...]
    """In the order of their entries."""
    get_tensor: Callable[[str], Tensor]
    """By the name it has in a segment."""

    @property
    def num_entries(self) -> int:
        """Of all its documents."""
        return sum(document.num_entries for document in self.documents)


@dataclass(frozen=True)
class Moved:
    """A segment of another folder that is moved as it is."""

    file: SegmentFile
    part: Part
    """All its documents."""


class SegmentFile:
    """The tensors of one segment, mapped to be read: whoever writes to them ends the process."""

    def __init__(self, folder: Path, record: SegmentRecord, description: FolderDescription) -> None:
        """Map the file.

        Raises:
            FileNotFoundError: it is not there.
            MemoryFolderError: it is no file, or another one than the manifest says.
        """
        self.record = record
        self.path = folder / record.file
        self._layout = plan_segment(
            description, record.num_entries, record.num_spans, record.num_text_bytes
        )
        self._is_verified = False
        self._num_searches = 0
        self._lock = threading.Lock()
        self._mapped = self._map()
        header = self._layout.header
        if self._mapped[: len(header)] != header:
            raise MemoryFolderError(
                f"{self.path} has another header than its manifest says: it was altered; {ADVICE}"
            )
        # The mapping cannot be written to, of which PyTorch would warn.
        kind: Any = type("MappedBytes", (ctypes.c_char * record.num_bytes,), {})
        self._bytes = kind.from_address(np.frombuffer(self._mapped, np.uint8).ctypes.data)
        self._bytes.mapped = self._mapped

    def _map(self) -> mmap.mmap:
        expected = self._layout.num_bytes
        if self.record.num_bytes != expected:
            raise MemoryFolderError(
                f"{self.path.parent / MANIFEST} is refused: {self.record.file} has "
                f"{self.record.num_bytes:,} bytes, and what it holds takes {expected:,}; {ADVICE}"
            )
        with explain_reading(self.path):
            descriptor = open_plain(self.path, is_link_allowed=False)
            try:
                self._compare_size(os.fstat(descriptor).st_size)
                return mmap.mmap(descriptor, expected, access=mmap.ACCESS_READ)
            finally:
                os.close(descriptor)

    def begin_search(self) -> None:
        """Refuse a file that was cut off after it was mapped: what is gone must not be touched.

        Of a large file what was searched is let go of now and then, so that not all of it is
        resident in the end.

        Raises:
            MemoryFolderError: it has another size.
        """
        self._compare_size(self._mapped.size())
        self._num_searches += 1
        if self._num_searches % _LET_GO_EVERY == 0:
            self._let_go_of_much()

    def _compare_size(self, size: int) -> None:
        if size != self.record.num_bytes:
            raise MemoryFolderError(
                f"{self.path} has {size:,} bytes and its manifest says {self.record.num_bytes:,}: "
                f"it was cut off or altered; {ADVICE}"
            )

    def verify(self) -> None:
        """Compare the checksum, and look for numbers that are not finite, once.

        Raises:
            MemoryFolderError: the file was altered, or was never right.
        """
        self._compare_size(self._mapped.size())
        with self._lock:
            if self._is_verified:
                return
            digest = hashlib.sha256()
            with memoryview(self._mapped) as content:
                for start in range(0, len(content), _PART_BYTES):
                    digest.update(content[start : start + _PART_BYTES])
                    self._let_go_of_much()
            if digest.hexdigest() != self.record.sha256:
                raise MemoryFolderError(
                    f"{self.path} was altered: its checksum is not that of its manifest; {ADVICE}"
                )
            for name, place in self._layout.places.items():
                if not place.dtype.is_floating_point:
                    continue
                for part in self._view(name).flatten().split(_PART_BYTES // place.dtype.itemsize):
                    if not is_finite(part):
                        raise MemoryFolderError(
                            f"{self.path} has entries that are NaN or infinite in {name}; {ADVICE}"
                        )
                    self._let_go_of_much()
            self._is_verified = True

    def let_go(self) -> None:
        """Keep nothing of the file in this process's memory; what is read is there again."""
        if hasattr(mmap, "MADV_DONTNEED"):
            self._mapped.madvise(mmap.MADV_DONTNEED)

    def _let_go_of_much(self) -> None:
        # A small file is read again at once, from memory.
        if self.record.num_bytes > _PART_BYTES:
            self.let_go()

    def get_tensor(self, name: str) -> Tensor:
        """A tensor by reference; entries are aligned.

        Raises:
            MemoryFolderError: the file was altered.
        """
        self.verify()
        return self._view(name)

    def _view(self, name: str) -> Tensor:
        place = self._layout.places[name]
        if not place.num_bytes:
            return torch.empty(place.shape, dtype=place.dtype)
        content, start = self._bytes, place.start
        if start % place.dtype.itemsize:
            content, start = bytearray(self._mapped[start : start + place.num_bytes]), 0
        count = math.prod(place.shape)
        flat = torch.frombuffer(content, dtype=place.dtype, count=count, offset=start)
        return flat.view(place.shape)

    def take(self, documents: Sequence[StoredDocument], without: Collection[str] = ()) -> Part:
        """All documents of this segment but some."""
        kept = (
            document
            for document in documents
            if document.segment == self.record.file and document.name not in without
        )
        return Part(tuple(kept), self.get_tensor)


@contextlib.contextmanager
def explain_reading(path: Path) -> Iterator[None]:
    """Turn errors of the system while a file of a memory is opened into ours, but a missing one.

    Raises:
        MemoryFolderError: it cannot be read, or is no plain file.
    """
    try:
        yield
    except FileNotFoundError:
        raise
    except OSError as error:
        raise MemoryFolderError(
            f"{path} cannot be read ({describe_failure(error)}); a memory consists of plain files, "
            "no links"
        ) from error


def plan_segment(
    description: FolderDescription, num_entries: int, num_spans: int, num_text_bytes: int
) -> TensorLayout:
    """The layout of a segment with so many entries, lines of spans and bytes of text."""
    # Entries stand first, so that they are aligned where the bytes of a key are.
    shape = (description.num_heads, num_entries, description.head_dim)
    names = [f"layers.{layer}.{kind}" for layer in description.layers for kind in ("key", "value")]
    return plan_tensors(
        {
            **{f"{name}s": (description.stored_dtype, shape) for name in names},
            **{
                f"{name}_factors": (torch.float32, shape[:2])
                for name in names
                if description.dtype == "int8"
            },
            "tokens": (torch.int32, (num_entries,)),
            "token_spans": (torch.int32, (num_spans, 2)),
            "texts": (torch.uint8, (num_text_bytes,)),
        },
        _METADATA,
    )


def write_segment(
    folder: Path, number: int, description: FolderDescription, parts: Sequence[Part]
) -> tuple[SegmentRecord, tuple[StoredDocument, ...]]:
    """Write a segment of these parts; nothing is rounded again, and nothing large is copied.

    Raises:
        ResourceError: it cannot be written.
        MemoryFolderError: a segment that a part is taken from is damaged.
    """
    file = _name_segment(number)
    counts, documents = number_documents(parts, file)
    layout = plan_segment(description, *counts)
    sha256 = write_bytes(folder / file, _iterate_content(parts, layout))
    return SegmentRecord(file, *counts, layout.num_bytes, sha256), documents


def move_segment(
    folder: Path, number: int, moved: Moved
) -> tuple[SegmentRecord, tuple[StoredDocument, ...]]:
    """Move a segment into this folder.

    Raises:
        OSError: it is on another disk, or gone.
    """
    file = _name_segment(number)
    os.replace(moved.file.path, folder / file)
    numbered = tuple(replace(document, segment=file) for document in moved.part.documents)
    return replace(moved.file.record, file=file), numbered


def _name_segment(number: int) -> str:
    return f"segment-{number:06d}.safetensors"


def number_documents(
    parts: Sequence[Part], file: str
) -> tuple[tuple[int, int, int], tuple[StoredDocument, ...]]:
    """Where the documents of these parts are in a segment; its entries, spans and bytes of text."""
    num_entries = num_spans = num_text_bytes = 0
    numbered = []
    for document in (document for part in parts for document in part.documents):
        first_entry, first_span, first_byte = num_entries, num_spans, num_text_bytes
        num_entries += document.num_entries
        num_spans += _length(document.spans)
        num_text_bytes += _length(document.text)
        numbered.append(
            replace(
                document,
                segment=file,
                first_entry=first_entry,
                spans=document.spans and (first_span, num_spans),
                text=document.text and (first_byte, num_text_bytes),
            )
        )
    return (num_entries, num_spans, num_text_bytes), tuple(numbered)


def _iterate_content(parts: Sequence[Part], layout: TensorLayout) -> Iterator[memoryview]:
    yield memoryview(layout.header)
    for name, place in layout.places.items():
        tensors = [part.get_tensor(name) for part in parts]
        ranges = [list_ranges(part.documents, name) for part in parts]
        # Entries of a head stand together.
        by_head = name.startswith("layers.")
        for head in range(place.shape[0] if by_head else 1):
            for tensor, chosen in zip(tensors, ranges, strict=True):
                lines = tensor[head] if by_head else tensor
                for start, stop in chosen:
                    yield view_bytes(lines[start:stop])


def list_ranges(documents: Sequence[StoredDocument], name: str) -> list[tuple[int, int]]:
    """Lines of the documents in a tensor; neighbors are joined."""
    ranges: list[tuple[int, int]] = []
    for document in documents:
        entries = (document.entries.start, document.entries.stop)
        found = {"texts": document.text, "token_spans": document.spans}.get(name, entries)
        if found is None or found[0] == found[1]:
            continue
        if ranges and ranges[-1][1] == found[0]:
            found = (ranges.pop()[0], found[1])
        ranges.append(found)
    return ranges


def _length(part: tuple[int, int] | None) -> int:
    return part[1] - part[0] if part else 0


def encode_layer(
    description: FolderDescription, layer: int, keys: Tensor, values: Tensor
) -> dict[str, Tensor]:
    """Keys and values (H, n, D) of a layer as tensors of a segment, by name, on the CPU.

    Raises:
        MemoryFolderError: a number that is NaN or infinite, or is so in the dtype of the folder.
    """
    encoded: dict[str, Tensor] = {}
    for kind, vectors in (("key", keys), ("value", values)):
        name, vectors = f"layers.{layer}.{kind}", vectors.detach().cpu()
        if description.dtype == "int8":
            codes, factors = encode_int8(vectors)
            encoded[f"{name}_factors"] = checked = factors.squeeze(-1)
        else:
            checked = codes = vectors.to(description.stored_dtype)
        if not is_finite(checked):
            raise MemoryFolderError(
                f"{kind}s of layer {layer} are NaN or infinite in {description.dtype}; only finite "
                "entries are kept: look for NaN in the weights or the input, or use bfloat16"
            )
        encoded[f"{name}s"] = codes.contiguous()
    return encoded


def decode_int8(codes: Tensor, factors: Tensor, dtype: torch.dtype) -> Tensor:
    """Vectors (H, n, D) of codes (H, n, D) and factors (H, n), rounded once."""
    decoded = torch.empty(codes.shape, dtype=dtype, device=codes.device)
    # Head by head: the product in fp32 needs twice the bytes of what is made.
    for head in range(codes.shape[0]):
        decoded[head] = codes[head].float() * factors[head].unsqueeze(-1)
    return decoded


def is_finite(numbers: Tensor) -> bool:
    """Whether none is NaN or infinite, in one pass without a mask."""
    return not numbers.numel() or all(bool(edge.isfinite()) for edge in numbers.aminmax())
