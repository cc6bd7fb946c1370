"""Tensors in safetensors files, whose headers are checked before anything is allocated."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from memorizing.errors import MemorizingError
from memorizing.storage.files import describe_failure, open_plain, write_bytes

FLOAT_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
"""Dtypes that weights and entries may have, by the name that settings give them."""

_ALIGNMENT = 64
"""The data begin at a multiple of so many bytes: a line of the processor's cache."""


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
class AwaitedTensor:
    """A tensor that is put together when its turn comes, such as from parts in other processes."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    fetch: Callable[[], Tensor]


MaybeAwaited = Mapping[str, Tensor | AwaitedTensor]
"""Tensors by name, some of which may not be there yet."""


class TensorLayout(NamedTuple):
    """Where everything stands in a file."""

    header: bytes
    """With its length; what the file begins with."""
    places: dict[str, TensorPlace]
    num_bytes: int
    """Of the whole file."""


class TensorHeader(NamedTuple):
    """What the header of a file says."""

    places: dict[str, Tensor]
    """Tensors without data (device `meta`)."""
    metadata: dict[str, str]


def plan_tensors(
    tensors: Mapping[str, tuple[torch.dtype, tuple[int, ...]]], metadata: Mapping[str, str]
) -> TensorLayout:
    """The layout of a safetensors file with tensors of these dtypes and shapes, in their order."""
    header: dict[str, object] = {"__metadata__": dict(metadata)}
    offsets, offset = [], 0
    for name, (dtype, shape) in tensors.items():
        offsets.append(offset)
        offset += math.prod(shape) * dtype.itemsize
        code = _name_dtype(dtype)
        header[name] = {"dtype": code, "shape": shape, "data_offsets": [offsets[-1], offset]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % _ALIGNMENT)
    first = 8 + len(text)
    places = {
        name: TensorPlace(*kind, first + start)
        for (name, kind), start in zip(tensors.items(), offsets, strict=True)
    }
    return TensorLayout(len(text).to_bytes(8, "little") + text, places, first + offset)


def _name_dtype(dtype: torch.dtype) -> str:
    """As safetensors names it: F32, BF16, F8_E4M3, I64, U8, BOOL, C64."""
    name = str(dtype).removeprefix("torch.").removesuffix("fn").upper()
    for kind in ("FLOAT", "INT", "COMPLEX"):
        name = name.replace(kind, kind[0])
    return name.replace("UI", "U")


def view_bytes(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous tensor on the CPU, by reference."""
    return tensor.reshape(-1).view(torch.uint8).numpy().data


def count_bytes(tensors: MaybeAwaited) -> int:
    """Bytes of all tensors."""
    return sum(math.prod(one.shape) * one.dtype.itemsize for one in tensors.values())


def fetch_tensors(tensors: MaybeAwaited) -> Iterator[tuple[str, Tensor]]:
    """The tensors one after another, in the order of a file; what is awaited is put together."""
    for name, tensor in _order(tensors).items():
        yield name, tensor if isinstance(tensor, Tensor) else tensor.fetch()


def _order(tensors: MaybeAwaited) -> MaybeAwaited:
    """Those of large numbers first, so that every tensor is aligned; then by name."""
    return dict(sorted(tensors.items(), key=lambda item: (-item[1].dtype.itemsize, item[0])))


def write_tensors(
    path: Path, tensors: MaybeAwaited, metadata: Mapping[str, str] | None = None
) -> str:
    """Write a safetensors file, whole or not at all, tensor by tensor; nothing large is copied.

    Args:
        path: of the file; folders are made where missing.
        tensors: of any device, also views and such that share memory, which are written each; one
            that is awaited is put together when it is written.
        metadata: texts; None is that of PyTorch's files.

    Returns:
        The SHA-256 of the file.

    Raises:
        ResourceError: the file cannot be written; nothing is left behind.
    """
    shapes = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in _order(tensors).items()}
    layout = plan_tensors(shapes, {"format": "pt"} if metadata is None else metadata)

    def iterate() -> Iterator[bytes | memoryview]:
        yield layout.header
        for _, tensor in fetch_tensors(tensors):
            yield view_bytes(tensor.detach().cpu().contiguous())

    return write_bytes(path, iterate())


def read_header(path: Path, error: type[MemorizingError], remedy: str) -> TensorHeader:
    """What a safetensors file holds, checked against its size; no tensor is read.

    Raises:
        MemorizingError: as in `read_tensors`.
    """
    with _open(path, error, remedy) as file:
        places = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
        return TensorHeader(
            {name: torch.empty(place.get_shape(), device="meta") for name, place in places.items()},
            dict(file.metadata() or {}),
        )


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
    if expected is not None:
        found = read_header(path, error, remedy).places
        check_shapes(str(path), found, expected, error, remedy)
    with _open(path, error, remedy) as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def check_shapes(
    where: str,
    found: Mapping[str, Any],
    expected: Mapping[str, Any],
    error: type[MemorizingError],
    remedy: str,
) -> None:
    """Refuse tensors of other names or shapes than expected.

    Raises:
        MemorizingError: of the given class, with the first that differs.
    """
    for name in sorted(found.keys() | expected.keys()):
        seen = str(tuple(found[name].shape)) if name in found else "missing"
        wanted = str(tuple(expected[name].shape)) if name in expected else "none"
        if seen != wanted:
            raise error(
                f"{where} is of another model: its {name} is {seen}, expected {wanted}; {remedy}"
            )


@contextmanager
def _open(path: Path, error: type[MemorizingError], remedy: str) -> Iterator[Any]:
    try:
        descriptor = open_plain(path)
        try:
            # safetensors takes names in UTF-8 only.
            is_utf8 = str(path).encode(errors="ignore").decode() == str(path)
            with safe_open(path if is_utf8 else f"/dev/fd/{descriptor}", "pt") as file:
                yield file
        finally:
            os.close(descriptor)
    except FileNotFoundError as cause:
        raise error(f"{path} is missing; {remedy}") from cause
    except (OSError, SafetensorError, RuntimeError) as cause:
        raise error(
            f"{path} cannot be read, or is truncated or altered ({describe_failure(cause)}); "
            f"{remedy}"
        ) from cause
