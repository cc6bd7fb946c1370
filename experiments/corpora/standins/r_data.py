"""Just enough of R's serialization (XDR, versions 2 and 3) to read lists of strings.

The format is in "R Internals", section "Serialization Formats"; lazy-loaded data are an index
(`.rdx`, a compressed list of offset and size by name) and objects (`.rdb`, each compressed after
four bytes with its expanded size).
"""

from __future__ import annotations

import struct
import zlib
from typing import Any

from memorizing.errors import CorpusError

_MAX_BYTES = 64 * 2**20
_NULL = (242, 250, 251, 252, 253, 254)  # NULL and the environments that every session has
_SYMBOL, _PAIRS, _CHARS, _INTS, _DOUBLES, _STRINGS, _LIST, _BACK = 1, 2, 9, 13, 14, 16, 19, 255
_LOGICALS = 10
_MISSING = -1


def read_lazy_data(index: bytes, objects: bytes) -> dict[str, list[str]]:
    """The character vectors among the data sets of an R package, by name.

    Raises:
        CorpusError: the data are damaged, or of a kind this does not read.
    """
    try:
        variables = _read(_expand(index))["variables"]
        values = {
            name: _read(_expand(objects[offset + 4 : offset + size]))
            for name, (offset, size) in variables.items()
        }
    except (struct.error, zlib.error, OSError, EOFError, KeyError, TypeError, ValueError) as error:
        raise CorpusError(f"R data cannot be read ({error}); the package is damaged") from error
    return {name: value for name, value in sorted(values.items()) if isinstance(value, list)}


def _expand(raw: bytes) -> bytes:
    expander = zlib.decompressobj(wbits=zlib.MAX_WBITS | 32)  # zlib or gzip
    expanded = expander.decompress(raw, _MAX_BYTES)
    if not expander.eof:
        raise ValueError("compressed data are cut off, or expand too far")
    return expanded


def _read(raw: bytes) -> Any:
    if raw[:2] != b"X\n":
        raise ValueError("not in R's XDR format")
    reader = _Reader(raw)
    version = reader.read_int()
    reader.take(8)  # the R that wrote it, the R that is needed
    if version == 3:
        reader.take(reader.read_int())  # the name of the encoding
    return reader.read_item()


class _Reader:
    """Reads one item after another from the position it is at."""

    def __init__(self, raw: bytes) -> None:
        self._raw = raw
        self._at = 2
        self._symbols: list[Any] = []

    def take(self, count: int) -> bytes:
        if count < 0 or self._at + count > len(self._raw):
            raise ValueError("data are cut off")
        self._at += count
        return self._raw[self._at - count : self._at]

    def read_int(self) -> int:
        return struct.unpack(">i", self.take(4))[0]

    def read_item(self) -> Any:
        flags = self.read_int()
        kind, has_attributes, has_tag = flags & 255, bool(flags & 512), bool(flags & 1024)
        if kind in _NULL:
            return None
        if kind == _BACK:
            return self._symbols[(flags >> 8 or self.read_int()) - 1]
        if kind == _SYMBOL:
            self._symbols.append(self.read_item())
            return self._symbols[-1]
        if kind == _PAIRS:
            return self._read_pairs(has_attributes, has_tag)
        size = self.read_int()
        if kind == _CHARS:
            return None if size == _MISSING else self.take(size).decode("utf-8")
        if kind in (_STRINGS, _LIST):
            value: Any = [self.read_item() for _ in range(size)]
        elif kind in (_INTS, _LOGICALS):
            value = struct.unpack(f">{size}i", self.take(4 * size))
        elif kind == _DOUBLES:
            value = struct.unpack(f">{size}d", self.take(8 * size))
        else:
            raise ValueError(f"items of kind {kind} are not read")
        names = (self.read_item() or {}).get("names") if has_attributes else None
        return dict(zip(names, value, strict=True)) if names else value

    def _read_pairs(self, has_attributes: bool, has_tag: bool) -> dict[Any, Any]:
        if has_attributes:
            self.read_item()
        tag = self.read_item() if has_tag else None
        first = self.read_item()
        return {tag: first, **(self.read_item() or {})}
