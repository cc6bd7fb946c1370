"""Files inside tar archives and gzip files, read as streams; nothing is ever extracted to disk.

An archive is somebody else's: its members may name places outside their folder, be links, or
expand without end. Such an archive is refused, and says so with the name of the member.
"""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import tarfile
import zlib
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from memorizing.errors import CorpusError

MAX_LINE_BYTES = 2**20
"""No line that `read_lines` reads is longer."""
MAX_MEMBER_BYTES = 512 * 2**20
"""No file of a corpus is larger, and none is read into memory that is."""
MAX_EXPANSION = 200
"""Expanded bytes per byte of the archive. Text and LaTeX with figures stay below 30; a bomb of one
repeated byte has 1,000."""
FREE_BYTES = 64 * 2**20
"""An archive may expand to this much whatever its size."""
READ_ERRORS = (tarfile.TarError, OSError, EOFError, zlib.error, lzma.LZMAError)
"""What reading a damaged archive raises."""

_OPENERS: dict[str, Any] = {
    ".gz": gzip.open,
    ".tgz": gzip.open,
    ".xz": lzma.open,
    ".bz2": bz2.open,
}


class UnsafeArchiveError(CorpusError):
    """An archive has a member that is not to be read; nothing of the archive is used."""


def read_members(path: Path, suffixes: tuple[str, ...]) -> Iterator[tuple[PurePosixPath, bytes]]:
    """Files of a tar archive whose names end in one of `suffixes`, in the order of the archive.

    Args:
        path: of a .tar, .tar.gz, .tgz, .tar.xz or .tar.bz2.
        suffixes: of names in lower case; () is all.

    Raises:
        UnsafeArchiveError: a member is absolute, leaves its folder, is a link or device, or the
            archive expands too far. Members before it were given by then: use none until the end,
            or `check_archive` first.
        tarfile.TarError, OSError, EOFError, zlib.error, lzma.LZMAError: the archive is damaged
            (`READ_ERRORS`).
    """
    with path.open("rb") as file:
        opener = _OPENERS.get(path.suffix.lower())
        stream = opener(file, "rb") if opener else file
        yield from _read_tar(stream, path.stat().st_size, path.name, suffixes)


def check_archive(path: Path) -> None:
    """Read the headers of all members of an archive, and nothing else.

    Raises:
        UnsafeArchiveError: as `read_members`.
        tarfile.TarError, OSError, EOFError, zlib.error, lzma.LZMAError: as `read_members`.
    """
    for _ in read_members(path, ("\0",)):
        pass  # no name ends so


def read_packed(
    raw: bytes, name: str, suffixes: tuple[str, ...]
) -> dict[PurePosixPath, bytes] | bytes:
    """What a gzip file in memory holds: the files of a tar archive, or else the bytes themselves.

    Raises:
        UnsafeArchiveError: as `read_members`; nothing of the file has been used then.
        tarfile.TarError, OSError, EOFError, zlib.error: the file is damaged.
    """
    with gzip.open(io.BytesIO(raw), "rb") as stream:
        head = _Bounded(stream, len(raw), name).read(tarfile.BLOCKSIZE)
    with gzip.open(io.BytesIO(raw), "rb") as stream:
        if _is_tar(head):
            return dict(_read_tar(stream, len(raw), name, suffixes))
        return _Bounded(stream, len(raw), name).read_all()


def read_lines(stream: Any, packed_bytes: int, name: str) -> Iterator[bytes]:
    """Lines of a packed file, none of which is held in memory beyond `MAX_LINE_BYTES`.

    Args:
        stream: of the expanded bytes.
        packed_bytes: size of the file that they are in.
        name: of that file, for messages.

    Raises:
        UnsafeArchiveError: a line is too long, or the file expands too far.
        OSError, EOFError, zlib.error: the file is damaged.
    """
    bounded = _Bounded(stream, packed_bytes, name)
    number = 1
    while line := bounded.read_line():
        if len(line) > MAX_LINE_BYTES:
            raise UnsafeArchiveError(
                f"line {number} of {name!r} has more than {MAX_LINE_BYTES:,} bytes: it is damaged, "
                "a bomb or not a file of lines; download it again"
            )
        yield line
        number += 1


def _is_tar(head: bytes) -> bool:
    try:
        tarfile.TarInfo.frombuf(head, "utf-8", "surrogateescape")
    except tarfile.HeaderError:
        return False
    return True


class _Bounded:
    """A stream of expanded bytes that refuses to go further than the archive's size allows."""

    def __init__(self, stream: Any, packed_bytes: int, name: str) -> None:
        self._stream = stream
        self._limit = max(FREE_BYTES, MAX_EXPANSION * packed_bytes)
        self._name = name

    def _require(self, end: int) -> None:
        if end > self._limit:
            raise UnsafeArchiveError(
                f"archive {self._name!r} expands to more than {self._limit:,} bytes, "
                f"{MAX_EXPANSION} times its size and over: it may be a bomb; unpack it yourself "
                "and give the folder"
            )

    def read(self, size: int) -> bytes:
        # tarfile reads long names and other headers in one call: their size is the archive's word.
        if size > MAX_MEMBER_BYTES:
            raise UnsafeArchiveError(
                f"archive {self._name!r} has a header of {size:,} bytes; it is damaged or a bomb"
            )
        self._require(self._stream.tell() + size - tarfile.RECORDSIZE)
        return self._stream.read(size)

    def read_all(self) -> bytes:
        blocks = []
        while block := self.read(2**20):
            blocks.append(block)
            self._require(self._stream.tell())
        return b"".join(blocks)

    def read_line(self) -> bytes:
        line = self._stream.readline(MAX_LINE_BYTES + 1)
        self._require(self._stream.tell())
        return line

    def seek(self, position: int) -> int:
        self._require(position)
        return self._stream.seek(position)

    def tell(self) -> int:
        return self._stream.tell()


def _read_tar(
    stream: Any, packed_bytes: int, name: str, suffixes: tuple[str, ...]
) -> Iterator[tuple[PurePosixPath, bytes]]:
    bounded: Any = _Bounded(stream, packed_bytes, name)
    with tarfile.open(fileobj=bounded, mode="r:", errorlevel=1) as archive:
        for member in archive:
            _require_safe(member, name)
            kept = member.isreg() and (not suffixes or member.name.lower().endswith(suffixes))
            file = archive.extractfile(member) if kept else None
            if file is not None:
                raw = file.read()
                if len(raw) < member.size:
                    raise tarfile.ReadError(f"{member.name!r} is cut off")
                yield PurePosixPath(member.name), raw


def _require_safe(member: tarfile.TarInfo, name: str) -> None:
    path = PurePosixPath(member.name.replace("\\", "/"))
    if path.is_absolute() or ".." in path.parts or path.parts[:1] and path.parts[0].endswith(":"):
        problem = "which leaves the folder it is unpacked in"
    elif member.issym() or member.islnk():
        problem = f"a link to {member.linkname!r}"
    elif member.issparse() or not (member.isreg() or member.isdir()):
        problem = "which is neither a file nor a folder"
    elif member.size > MAX_MEMBER_BYTES:
        problem = f"which says it has {member.size:,} bytes (at most {MAX_MEMBER_BYTES:,})"
    else:
        return
    raise UnsafeArchiveError(
        f"archive {name!r} has the member {member.name!r}, {problem}; nothing of it is used: "
        "unpack it yourself where that is safe, and give the folder"
    )
