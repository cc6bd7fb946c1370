"""Files inside tar archives and packed files, read as streams; nothing is ever extracted to disk.

An archive is somebody else's: its members may name places outside their folder or expand without
end. Such an archive is refused, and says so with the name of the member.
"""

from __future__ import annotations

import bz2
import codecs
import contextlib
import functools
import gzip
import io
import itertools
import lzma
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import IO, Any

from memorizing.errors import CorpusError
from memorizing.storage.files import open_plain

INSTALL = "pip install 'memorizing[corpora]'"
"""What to do where a library that only some corpora need is missing."""

MAX_LINE_BYTES = 2**20
"""No line that `read_lines` reads is longer."""
MAX_MEMBER_BYTES = 512 * 2**20
"""No file of a corpus is larger, and none is read into memory that is."""
MAX_EXPANSION = 200
"""Expanded bytes per byte of the archive. Text and LaTeX with figures stay below 30; a bomb of one
repeated byte has 1,000."""
FREE_BYTES = 64 * 2**20
"""An archive may expand to this much whatever its size."""
READ_ERRORS = (
    *(tarfile.TarError, zipfile.BadZipFile, OSError, EOFError, zlib.error, lzma.LZMAError),
    NotImplementedError,  # of zipfile: a version or feature of archives that it does not know
)
"""What reading a damaged archive raises."""


class UnsafeArchiveError(CorpusError):
    """An archive has a member that is not to be read; nothing of the archive is used."""


def read_members(path: Path, keep: Callable[[str], bool]) -> Iterator[tuple[PurePosixPath, bytes]]:
    """Files of a tar archive, packed or not, in the order of the archive.

    Links are passed over, and so is what macOS keeps beside files (`._name`): neither has text.

    Args:
        path: of the archive.
        keep: whether a file of this name is wanted.

    Raises:
        UnsafeArchiveError: a member is absolute, leaves its folder or is a device, or the
            archive expands too far. Members before it were given by then: use none until the end,
            or `check_archive` first.
        tarfile.TarError, OSError, EOFError, zlib.error, lzma.LZMAError: the archive is damaged
            (`READ_ERRORS`).
    """
    with open_packed(path) as stream:
        yield from read_tar(stream, path.stat().st_size, path.name, keep)


@contextlib.contextmanager
def open_packed(path: Path) -> Iterator[Any]:
    """A stream of what a file holds, expanded where it is packed, whatever its name.

    Raises:
        OSError: it cannot be read, or is no plain file.
        CorpusError: it is packed by Zstandard, and pyarrow is not installed.
        zipfile.BadZipFile: of a zip file, see `open_zipped`.
    """
    with open(open_plain(path), "rb") as file, unpack(file) as stream:
        yield stream


def unpack(file: Any) -> Any:
    """What is in a file from where it is read next, expanded where it is packed."""
    place = file.tell()
    head = file.read(6)
    file.seek(place)
    opener = next((make for magic, make in _MAGIC.items() if head.startswith(magic)), None)
    return opener(file) if opener else contextlib.nullcontext(file)


def _open_zstandard(file: Any) -> Any:
    try:
        import pyarrow
    except ImportError as error:
        raise CorpusError(f"a file packed by Zstandard needs pyarrow; {INSTALL}") from error
    return io.BufferedReader(pyarrow.input_stream(file, compression="zstd"))


def _open_json_of_zip(file: Any) -> Any:
    archive = zipfile.ZipFile(file)
    member = next((one for one in archive.infolist() if one.filename.endswith(".json")), None)
    if member is None:
        raise zipfile.BadZipFile("it holds no .json file")
    return open_zipped(archive, member)


def open_zipped(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> IO[bytes]:
    """A stream of what a member of a zip file holds.

    Raises:
        zipfile.BadZipFile: it is encrypted, or packed by another method than deflate.
    """
    if member.flag_bits & 1:
        raise zipfile.BadZipFile(f"its {member.filename!r} is encrypted")
    # The others expand a block of their input at once, however large that becomes.
    if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise zipfile.BadZipFile(f"its {member.filename!r} is not compressed by deflate")
    return io.BufferedReader(archive.open(member))  # type: ignore[arg-type]


_MAGIC: dict[bytes, Callable[[Any], Any]] = {
    b"\x1f\x8b": gzip.open,
    b"\xfd7zXZ\0": lzma.open,
    b"BZh": bz2.open,
    b"\x28\xb5\x2f\xfd": _open_zstandard,
    b"PK\x03\x04": _open_json_of_zip,
}
"""What begins a packed file. Names lie: browsers unpack a .gz and leave its name."""


def check_archive(path: Path) -> None:
    """Read the headers of all members of an archive, and nothing else.

    Raises:
        UnsafeArchiveError: as `read_members`.
        tarfile.TarError, OSError, EOFError, zlib.error, lzma.LZMAError: as `read_members`.
    """
    for _ in read_members(path, lambda name: False):
        pass


def read_packed(
    raw: bytes, name: str, keep: Callable[[str], bool]
) -> dict[PurePosixPath, bytes] | bytes:
    """What a gzip file in memory holds: the files of a tar archive, or else the bytes themselves.

    An archive may also be unpacked already.

    Raises:
        UnsafeArchiveError: as `read_members`; nothing of the file has been used then.
        tarfile.TarError, OSError, EOFError, zlib.error: the file is damaged.
    """
    is_tar = _is_tar(raw[: tarfile.BLOCKSIZE])
    with io.BytesIO(raw) if is_tar else gzip.open(io.BytesIO(raw)) as stream:
        head = stream.read(tarfile.BLOCKSIZE)
        stream.seek(0)
        if is_tar or _is_tar(head):
            return dict(read_tar(stream, len(raw), name, keep))
        bounded = _Bounded(stream, len(raw), name)
        return b"".join(iter(functools.partial(bounded.read, tarfile.RECORDSIZE), b""))


def read_lines(
    stream: Any, packed_bytes: int, name: str, most: int = MAX_LINE_BYTES
) -> Iterator[bytes]:
    """Lines of a file, packed or not, without a byte order mark.

    Args:
        stream: of the expanded bytes.
        packed_bytes: size of the file that they are in.
        name: of that file, for messages.
        most: bytes of a line; no more are held in memory.

    Raises:
        UnsafeArchiveError: a line is too long, or the file expands too far.
        OSError, EOFError, zlib.error: the file is damaged.
    """
    num_bytes = 0
    for number in itertools.count(1):
        line = stream.readline(most + 1)
        num_bytes += len(line)
        _require_within(num_bytes, packed_bytes, name)
        if len(line) > most:
            raise UnsafeArchiveError(
                f"line {number} of {name!r} has more than {most:,} bytes: it is damaged, "
                "a bomb or not a file of lines; download it again"
            )
        if not line:
            return
        yield line.removeprefix(codecs.BOM_UTF8) if number == 1 else line


def _is_tar(head: bytes) -> bool:
    try:
        tarfile.TarInfo.frombuf(head, "utf-8", "surrogateescape")
    except tarfile.HeaderError:
        return False
    return True


def _require_within(num_bytes: int, packed_bytes: int, name: str) -> None:
    """Refuse to go further than the size of an archive allows."""
    limit = max(FREE_BYTES, MAX_EXPANSION * packed_bytes)
    if num_bytes > limit:
        raise UnsafeArchiveError(
            f"archive {name!r} expands to more than {limit:,} bytes, {MAX_EXPANSION} times its "
            "size and over: it may be a bomb; unpack it yourself and give the folder"
        )


class _Bounded:
    """A stream of expanded bytes, as far as `_require_within` lets it go."""

    def __init__(self, stream: Any, packed_bytes: int, name: str) -> None:
        self._stream, self._packed_bytes, self._name = stream, packed_bytes, name
        self.tell = stream.tell

    def read(self, size: int) -> bytes:
        # tarfile reads long names and other headers in one call: their size is the archive's word.
        if size > MAX_MEMBER_BYTES:
            raise UnsafeArchiveError(
                f"archive {self._name!r} has a header of {size:,} bytes; it is damaged or a bomb"
            )
        end = self.tell() + size - tarfile.RECORDSIZE
        _require_within(end, self._packed_bytes, self._name)
        return self._stream.read(size)

    def seek(self, position: int) -> int:
        _require_within(position, self._packed_bytes, self._name)
        return self._stream.seek(position)


def read_tar(
    stream: Any, packed_bytes: int, name: str, keep: Callable[[str], bool]
) -> Iterator[tuple[PurePosixPath, bytes]]:
    """`read_members` of a stream of expanded bytes, from a file of `packed_bytes` bytes."""
    bounded: Any = _Bounded(stream, packed_bytes, name)
    with tarfile.open(fileobj=bounded, mode="r:", errorlevel=1) as archive:
        for member in archive:
            path = PurePosixPath(member.name)
            _require_safe(member, name)
            is_wanted = member.isreg() and not path.name.startswith("._") and keep(member.name)
            file = archive.extractfile(member) if is_wanted else None
            if file is not None:
                raw = file.read()
                if len(raw) < member.size:
                    raise tarfile.ReadError(f"{member.name!r} is cut off")
                yield path, raw


def _require_safe(member: tarfile.TarInfo, name: str) -> None:
    if leaves_folder(member.name):
        problem = "which leaves the folder it is unpacked in"
    elif member.issparse() or not (
        member.isreg() or member.isdir() or member.issym() or member.islnk()
    ):
        problem = "which is neither a file nor a folder"
    elif member.size > MAX_MEMBER_BYTES:
        problem = f"which says it has {member.size:,} bytes (at most {MAX_MEMBER_BYTES:,})"
    else:
        return
    raise UnsafeArchiveError(
        f"archive {name!r} has the member {member.name!r}, {problem}; nothing of it is used: "
        "unpack it yourself where that is safe, and give the folder"
    )


def leaves_folder(name: str) -> bool:
    """Whether a member's name leads out of the folder that an archive is unpacked in."""
    path = PurePosixPath(name.replace("\\", "/"))
    return path.is_absolute() or ".." in path.parts or "".join(path.parts[:1]).endswith(":")
