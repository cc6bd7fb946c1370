"""Files that are whole or not there, also after the power fails; and reading them with care.

A file is written under a temporary name, synced and renamed; then its folder is synced. Temporary
names are alike for everything that is written, say who wrote them, and are removed when that
process is gone.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import math
import os
import re
import shutil
import socket
import stat
import uuid
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import psutil
from safetensors import SafetensorError

from memorizing.errors import MemorizingError, ResourceError

_REASONS = {
    errno.ENOSPC: "no space left",
    errno.EDQUOT: "no space left in the quota",
    errno.EMFILE: "too many files are open in this process; `ulimit -n` raises the limit",
    errno.ENFILE: "too many files are open on this machine",
}
FULL_DISK = (errno.ENOSPC, errno.EDQUOT)
"""Errors of the system that mean: no space left."""

MOST_JSON_BYTES = 2**28
"""Larger JSON is refused: as objects of Python it takes some ten times as much memory."""


def _name_host() -> str:
    """This machine, and which of its processes have numbers of their own: those of a container."""
    name = socket.gethostname()
    with contextlib.suppress(OSError):
        name += os.readlink("/proc/self/ns/pid")
    return hashlib.sha256(name.encode(errors="replace")).hexdigest()[:8]


_HOST = _name_host()
_TEMPORARY = re.compile(r"\.memorizing-([0-9a-f]{8})-(\d{1,10})-[0-9a-f]{8}\.(?:part|was-(.+))")
_OLD_TEMPORARY = re.compile(
    r"\.[^/]+\.[0-9a-f]{12}4[0-9a-f]{19}|\.partial-(?:replaced-(step-\d+)|step-\d+)"
    r"|\.(?:manifest\.json|segment-\d{6,12}\.safetensors|\d+-\w+-[0-9a-f]{12})\.part"
)
"""Names that earlier releases gave."""
_in_use: set[str] = set()
"""Temporary names of this process."""


@contextlib.contextmanager
def explain_failures(
    what: object, remedy: str = "free some space, or choose another folder"
) -> Iterator[None]:
    """Turn errors of the system while something is written into ours, also those of safetensors.

    Args:
        what: cannot be written.
        remedy: what to do.

    Raises:
        ResourceError: there is no space left, too many files are open, or the place cannot be
            written.
    """
    try:
        yield
    except MemorizingError:
        raise
    except (OSError, SafetensorError) as error:
        # safetensors writes from Rust and reports the system's error as text.
        if isinstance(error, OSError) or find_error_number(error):
            raise ResourceError(
                f"cannot write {what}: {describe_failure(error)}; what was saved before is "
                f"unharmed: {remedy}"
            ) from error
        raise


def find_error_number(error: Exception) -> int | None:
    """The system's number of an error, also where a library gives it as text."""
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno
    found = re.search(r"os error (\d+)\)", str(error))
    return int(found[1]) if found else None


def describe_failure(error: Exception) -> str:
    """What the system says, in words that help."""
    number = find_error_number(error)
    strerror = error.strerror if isinstance(error, OSError) else None
    return _REASONS.get(number or 0) or strerror or str(error) or type(error).__name__


@contextlib.contextmanager
def name_temporary(folder: Path, ending: str = "part") -> Iterator[Path]:
    """A temporary name in a folder, for as long as the block runs; what is there then is removed.

    Args:
        folder: where it is.
        ending: `part`, or `was-` and the name that it has to get back after a kill.
    """
    path = folder / f".memorizing-{_HOST}-{os.getpid()}-{uuid.uuid4().hex[:8]}.{ending}"
    _in_use.add(path.name)
    try:
        yield path
    finally:
        # Whatever stops the removal: another writer of this process may go on with it.
        _in_use.discard(path.name)
        with contextlib.suppress(OSError):
            remove(path)


def is_leftover(name: str, *, is_locked: bool = False) -> bool:
    """Whether a file or folder of this name was left by a writer that is gone.

    Args:
        name: its name.
        is_locked: the caller is the only writer there; the names of earlier releases, which do not
            say who wrote them, and those of other machines count then.
    """
    found = _TEMPORARY.fullmatch(name)
    if found is None:
        return is_locked and _OLD_TEMPORARY.fullmatch(name) is not None
    if name in _in_use:
        return False
    if is_locked or found[1] == _HOST and int(found[2]) == os.getpid():
        return True
    return found[1] == _HOST and not psutil.pid_exists(int(found[2]))


def remove_leftovers(folder: Path, *, is_locked: bool = False) -> None:
    """Remove what writers that are gone left in a folder, and put back what they had put away.

    Nothing else is touched and no link is followed. What cannot be removed (it may be another
    user's) stays.

    Args:
        folder: where; it may be missing.
        is_locked: as in `is_leftover`.
    """
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        if not is_leftover(path.name, is_locked=is_locked):
            continue
        found = _TEMPORARY.fullmatch(path.name) or _OLD_TEMPORARY.fullmatch(path.name)
        assert found is not None
        put_away = found[found.re.groups]
        with contextlib.suppress(OSError):
            if put_away is not None and not os.path.lexists(folder / put_away):
                os.rename(path, folder / put_away)
            else:
                remove(path)


def remove(path: Path) -> None:
    """Remove a file, a link or a whole folder, or nothing."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def write_bytes(path: Path, content: bytes | Iterable[bytes | memoryview]) -> str:
    """Write a file, whole or not at all; folders are made where missing.

    Args:
        path: a file that is there is replaced; a link too, and not what it leads to.
        content: all of it, or pieces that are written one after the other.

    Returns:
        The SHA-256 of the content.

    Raises:
        ResourceError: there is no space left, or the folder cannot be written. Nothing is left
            behind, and a file that was there is as it was.
    """
    digest = hashlib.sha256()
    with explain_failures(repr(str(path))):
        path.parent.mkdir(parents=True, exist_ok=True)
        with name_temporary(path.parent) as temporary:
            with temporary.open("xb") as file:
                for piece in [content] if isinstance(content, bytes) else content:
                    file.write(piece)
                    digest.update(piece)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        sync(path.parent)
    return digest.hexdigest()


def write_output(path: Path, content: bytes) -> None:
    """Write what a user wants to have at a path, whole or not at all; see `check_output`.

    Raises:
        ResourceError: the path is a folder, or cannot be written.
    """
    target = check_output(path)
    if target is not None:
        write_bytes(target, content)
        return
    with explain_failures(repr(str(path))), open(path, "ab", buffering=0) as file:
        rest = memoryview(content)
        while rest:
            rest = rest[file.write(rest) :]


def check_output(path: Path) -> Path | None:
    """Find out whether something can be written to a path. Makes its folder where missing.

    Links are followed. What is no plain file (a device, a pipe, a descriptor of this process) is
    written to, and stays what it is.

    Returns:
        The plain file that is made or replaced; None where the path itself is written to.

    Raises:
        ResourceError: the path is a folder, or nothing can be written there.
    """
    with explain_failures(repr(str(path))):
        try:
            mode = os.stat(path).st_mode
        except FileNotFoundError:
            mode = stat.S_IFREG
        except ValueError as error:
            raise ResourceError(f"{str(path)!r} is no path ({error}); give another name") from error
        if stat.S_ISDIR(mode):
            raise ResourceError(f"{str(path)!r} is a folder; give the name of a file in it")
        # /dev/stdout may be a plain file, which holds what was printed so far.
        is_descriptor = str(path.absolute()).startswith(("/dev/fd/", "/dev/std", "/proc/"))
        if not stat.S_ISREG(mode) or is_descriptor:
            return None
        target = Path(os.path.realpath(path))
        target.parent.mkdir(parents=True, exist_ok=True)
        if not os.access(target.parent, os.W_OK):
            raise PermissionError(errno.EACCES, "its folder cannot be written", str(path))
        return target


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """Write values as JSON, whole or not at all; see `encode_json`.

    Raises:
        ResourceError: the file cannot be written.
    """
    write_bytes(path, encode_json(values))


def encode_json(values: Mapping[str, Any]) -> bytes:
    """Values as JSON in UTF-8; numbers that are not finite become null.

    Names of files that are no UTF-8 keep their bytes as lone surrogates, which JSON can escape.
    """
    text = json.dumps(_replace_non_finite(values), indent=2, ensure_ascii=False, allow_nan=False)
    return f"{text}\n".encode(errors="backslashreplace")


def _replace_non_finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _replace_non_finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_replace_non_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_json(
    path: Path, error: type[MemorizingError], remedy: str, *, missing: str = ""
) -> dict[str, Any]:
    """Read a JSON object that somebody else may have written.

    Args:
        path: of the file.
        error: what is raised.
        remedy: what to do about a file that is damaged; the end of the message.
        missing: the message about a file that is not there; empty is as about any other.

    Raises:
        MemorizingError: of the given class: no such file, no plain file, too large, not in UTF-8,
            not JSON, nested too deeply, or no object.
    """
    try:
        return parse_json(read_bytes(path))
    except FileNotFoundError as cause:
        raise error(missing or f"{path} is missing; {remedy}") from cause
    except (OSError, ValueError) as cause:
        raise error(
            f"{path} cannot be read, or is truncated or altered ({describe_failure(cause)}); "
            f"{remedy}"
        ) from cause


def read_bytes(path: Path, *, most: int = MOST_JSON_BYTES, is_link_allowed: bool = True) -> bytes:
    """The content of a plain file; waits for no pipe and no device.

    Raises:
        OSError: it cannot be read, is no plain file, or has more than `most` bytes.
    """
    with open(open_plain(path, is_link_allowed=is_link_allowed), "rb") as file:
        size = os.fstat(file.fileno()).st_size
        if size > most:
            raise OSError(errno.EFBIG, f"it has {size:,} bytes, more than {most:,}", str(path))
        return file.read(most)


def open_plain(path: Path, *, is_link_allowed: bool = True) -> int:
    """A descriptor of a plain file that is read; links to one count where they are allowed.

    Raises:
        OSError: it cannot be read, or is no plain file.
    """
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0)
    if not is_link_allowed:
        flags |= getattr(os, "O_NOFOLLOW", 0)
    descriptor = os.open(path, flags)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "it is no file", str(path))
    return descriptor


def parse_json(content: bytes) -> dict[str, Any]:
    """A JSON object in UTF-8, with a byte order mark or without.

    Raises:
        ValueError: it is none; the message says why.
    """
    try:
        values = json.loads(content.decode("utf-8-sig"))
    except (ValueError, RecursionError, MemoryError) as error:
        raise ValueError(f"it is not JSON in UTF-8: {error or 'too large'}") from error
    if not isinstance(values, dict):
        raise ValueError("it does not hold a JSON object")
    return values


def sync(path: Path) -> None:
    """Flush a file, or the names in a folder where the system can, to the disk."""
    if path.is_dir() and not hasattr(os, "O_DIRECTORY"):
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
