"""Where everything stands in a segment file: a safetensors file whose header follows from counts.

    layers.<layer>.keys           (H, n, D)      entries, oldest first, no position in them
    layers.<layer>.values         (H, n, D)
    layers.<layer>.key_factors    (H, n) fp32    only int8: key = code * factor
    layers.<layer>.value_factors  (H, n) fp32    only int8
    tokens                        (n,) int32     place of every entry's token in its document
    token_spans                   (s, 2) int32   first character, and one after the last, of tokens
                                                 of documents whose text is kept with them
    texts                         (b,) uint8     texts that are kept, UTF-8, one behind the other

A header that is known beforehand is compared as a whole, so that nothing in it has to be trusted.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass

import torch

from memorizing.memory.disk.description import FolderDescription

_FORMAT = "memorizing memory segment 1"
_ALIGNMENT = 64
"""The data begin at a multiple of so many bytes: a line of the processor's cache."""

_CODES = {
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int8: "I8",
    torch.int32: "I32",
    torch.uint8: "U8",
}


@dataclass(frozen=True)
class Counts:
    """What a segment holds of each kind."""

    num_entries: int
    num_spans: int
    num_text_bytes: int


@dataclass(frozen=True)
class TensorPlace:
    """A tensor in a file."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    """Byte in the file."""

    @property
    def num_bytes(self) -> int:
        """Its length in the file."""
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class SegmentLayout:
    """A segment file as it must be."""

    header: bytes
    places: dict[str, TensorPlace]
    num_bytes: int
    """Of the whole file."""


def plan_segment(description: FolderDescription, counts: Counts) -> SegmentLayout:
    """The layout of a segment with so many entries."""
    tensors = dict(_list_tensors(description, counts))
    offset = 0
    header: dict[str, object] = {"__metadata__": {"format": _FORMAT}}
    offsets = {}
    for name, (dtype, shape) in tensors.items():
        end = offset + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": _CODES[dtype], "shape": shape, "data_offsets": [offset, end]}
        offsets[name], offset = offset, end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % _ALIGNMENT)
    first = 8 + len(text)
    places = {
        name: TensorPlace(dtype, shape, first + offsets[name])
        for name, (dtype, shape) in tensors.items()
    }
    return SegmentLayout(len(text).to_bytes(8, "little") + text, places, first + offset)


def _list_tensors(
    description: FolderDescription, counts: Counts
) -> list[tuple[str, tuple[torch.dtype, tuple[int, ...]]]]:
    # Entries stand first, so that they are aligned where the bytes of a key are.
    entries, factors = [], []
    shape = (description.num_heads, counts.num_entries, description.head_dim)
    for layer in description.layers:
        for kind in ("key", "value"):
            entries.append((f"layers.{layer}.{kind}s", (description.stored_dtype, shape)))
            if description.dtype == "int8":
                factors.append((f"layers.{layer}.{kind}_factors", (torch.float32, shape[:2])))
    return [
        *entries,
        *factors,
        ("tokens", (torch.int32, (counts.num_entries,))),
        ("token_spans", (torch.int32, (counts.num_spans, 2))),
        ("texts", (torch.uint8, (counts.num_text_bytes,))),
    ]
