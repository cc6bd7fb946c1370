"""Tensors in safetensors files, whose headers are checked before anything is allocated.

8 bytes     length of the header, little-endian
header      JSON: per tensor its dtype, shape and first and last byte in the data; metadata
data        tensors one behind the other, without holes
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from memorizing.errors import MemorizingError
from memorizing.storage.files import describe_failure, open_plain, parse_json, write_bytes

FLOAT_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
"""Dtypes that weights and entries may have, by the name that settings give them."""

_CODES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint64: "U64",
    torch.uint32: "U32",
    torch.uint16: "U16",
    torch.uint8: "U8",
    torch.bool: "BOOL",
    torch.complex64: "C64",
}
_DTYPES = {code: dtype for dtype, code in _CODES.items()}
_ALIGNMENT = 64
"""The data begin at a multiple of so many bytes: a line of the processor's cache."""
_MOST_HEADER_BYTES = 100_000_000
"""As safetensors has it."""
_LARGEST = 2**48
"""Of a dimension; no file has more."""
_MOST_DIMS = 64
"""As PyTorch has it."""


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
class TensorLayout:
    """Where everything stands in a file."""

    header: bytes
    """With its length; what the file begins with."""
    places: dict[str, TensorPlace]
    num_bytes: int
    """Of the whole file."""


@dataclass(frozen=True)
class TensorHeader:
    """What the header of a file says."""

    places: dict[str, TensorPlace]
    metadata: dict[str, str]


def plan_tensors(
    tensors: Mapping[str, tuple[torch.dtype, tuple[int, ...]]], metadata: Mapping[str, str]
) -> TensorLayout:
    """The layout of a file with tensors of these dtypes and shapes, in their order."""
    offset = 0
    header: dict[str, object] = {"__metadata__": dict(metadata)}
    offsets = []
    for name, (dtype, shape) in tensors.items():
        end = offset + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": _CODES[dtype], "shape": shape, "data_offsets": [offset, end]}
        offsets.append(offset)
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % _ALIGNMENT)
    first = 8 + len(text)
    places = {
        name: TensorPlace(dtype, shape, first + start)
        for (name, (dtype, shape)), start in zip(tensors.items(), offsets, strict=True)
    }
    return TensorLayout(len(text).to_bytes(8, "little") + text, places, first + offset)


def view_bytes(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous tensor on the CPU, by reference."""
    return tensor.reshape(-1).view(torch.uint8).numpy().data


def write_tensors(
    path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> str:
    """Write a safetensors file, whole or not at all, tensor by tensor; nothing large is copied.

    Args:
        path: of the file; folders are made where missing.
        tensors: of any device, also views and such that share memory, which are written each.
        metadata: texts; None is that of PyTorch's files.

    Returns:
        The SHA-256 of the file.

    Raises:
        ResourceError: the file cannot be written; nothing is left behind.
    """
    # Those of large numbers first, so that every tensor is aligned.
    ordered = dict(sorted(tensors.items(), key=lambda item: (-item[1].dtype.itemsize, item[0])))
    shapes = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in ordered.items()}
    layout = plan_tensors(shapes, {"format": "pt"} if metadata is None else metadata)

    def iterate() -> Iterator[bytes | memoryview]:
        yield layout.header
        for tensor in ordered.values():
            yield view_bytes(tensor.detach().cpu().contiguous())

    return write_bytes(path, iterate())


def read_header(path: Path, error: type[MemorizingError], remedy: str) -> TensorHeader:
    """What a safetensors file holds, checked against its size; no tensor is read.

    Raises:
        MemorizingError: as in `read_tensors`.
    """
    with _open(path, error, remedy) as file:
        return _parse_header(path, file, error, remedy)


def read_tensors(
    path: Path,
    error: type[MemorizingError],
    remedy: str,
    *,
    expected: Mapping[str, Tensor] | None = None,
) -> dict[str, Tensor]:
    """The tensors of a safetensors file, on the CPU.

    Args:
        path: of the file.
        error: what is raised about a file that is damaged, missing or of another kind.
        remedy: what to do then; the end of the message.
        expected: tensors of the same names and shapes; others are refused before any is read.

    Raises:
        MemorizingError: of the given class: the file is missing, truncated or altered, or holds
            other tensors than expected.
    """
    with _open(path, error, remedy) as file:
        places = _parse_header(path, file, error, remedy).places
        if expected is not None:
            check_shapes(str(path), places, expected, error, remedy)
        tensors = {}
        for name, place in places.items():
            try:
                tensors[name] = torch.empty(place.shape, dtype=place.dtype)
                file.seek(place.start)
                num_bytes = file.readinto(view_bytes(tensors[name])) if place.num_bytes else 0  # type: ignore[attr-defined]
            except OSError as cause:
                raise error(
                    f"{path} cannot be read: {describe_failure(cause)}; {remedy}"
                ) from cause
            if num_bytes != place.num_bytes:
                raise error(f"{path} is truncated: it ends within {name!r}; {remedy}")
    return tensors


def check_shapes(
    where: str,
    found: Mapping[str, Any],
    expected: Mapping[str, Any],
    error: type[MemorizingError],
    remedy: str,
) -> None:
    """Refuse tensors, or places of tensors, of other names or shapes than expected.

    Raises:
        MemorizingError: of the given class, with the first that differs.
    """
    for name in sorted(found.keys() | expected.keys()):
        seen = tuple(found[name].shape) if name in found else None
        wanted = tuple(expected[name].shape) if name in expected else None
        if seen != wanted:
            raise error(
                f"{where} is of another model: its {name} is {_show(seen, 'missing')}, expected "
                f"{_show(wanted, 'none')}; {remedy}"
            )


def _show(shape: tuple[int, ...] | None, absent: str) -> str:
    return absent if shape is None else str(shape)


def _open(path: Path, error: type[MemorizingError], remedy: str) -> BinaryIO:
    try:
        return open(open_plain(path), "rb")
    except FileNotFoundError as cause:
        raise error(f"{path} is missing; {remedy}") from cause
    except OSError as cause:
        raise error(f"{path} cannot be read: {describe_failure(cause)}; {remedy}") from cause


def _parse_header(
    path: Path, file: BinaryIO, error: type[MemorizingError], remedy: str
) -> TensorHeader:
    """Read the header of a file that is open."""
    try:
        size = os.fstat(file.fileno()).st_size
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, _MOST_HEADER_BYTES):
            raise ValueError(f"its header has {length:,} bytes, and all of it {size:,}")
        values = parse_json(file.read(length))
        metadata = values.pop("__metadata__", {})
        if not isinstance(metadata, dict) or not all(
            isinstance(text, str) for text in metadata.values()
        ):
            raise ValueError("its metadata are no texts")
        first = 8 + length
        places = {name: _parse_place(name, value, first) for name, value in values.items()}
        end = first
        for place in sorted(places.values(), key=lambda one: (one.start, one.num_bytes)):
            if place.start != end:
                raise ValueError("its tensors do not stand one behind the other")
            end += place.num_bytes
        if end != size:
            raise ValueError(f"its tensors end at byte {end:,}, and it at {size:,}")
    except (OSError, ValueError) as cause:
        raise error(
            f"{path} is no safetensors file, or is truncated or altered ({cause}); {remedy}"
        ) from cause
    return TensorHeader(places, metadata)


def _parse_place(name: str, value: Any, first: int) -> TensorPlace:
    match value:
        case {
            "dtype": str(code),
            "shape": list(shape),
            "data_offsets": [int(start), int(stop)],
        } if (
            code in _DTYPES
            and start >= 0
            and len(shape) <= _MOST_DIMS
            and all(type(dim) is int and 0 <= dim < _LARGEST for dim in shape)
        ):
            place = TensorPlace(_DTYPES[code], tuple(shape), first + start)
            if place.num_bytes == stop - start:
                return place
    raise ValueError(f"its tensor {name!r} is not described as one")
