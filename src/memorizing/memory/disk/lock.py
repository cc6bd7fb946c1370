"""One writer at a time. Readers take no lock."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Iterator
from pathlib import Path

from memorizing.errors import MemoryFolderError

LOCK = "lock"


@contextlib.contextmanager
def hold_lock(folder: Path) -> Iterator[None]:
    """Be the only writer of a folder for a while. The system releases it when a process ends.

    Raises:
        MemoryFolderError: another writer holds it, also one of this process.
        OSError: the lock file cannot be written.
    """
    try:
        import fcntl
    except ImportError as error:
        raise MemoryFolderError(
            f"{folder} cannot be written on this system: it has no file locks (fcntl); memories "
            "can be read here, and written on Linux and macOS"
        ) from error
    flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
    descriptor = os.open(folder / LOCK, flags, 0o666)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            owner = os.pread(descriptor, 200, 0).decode(errors="replace").strip() or "a process"
            raise MemoryFolderError(
                f"{folder} is being written by {owner}; only one may write at a time: wait until "
                "it is done (reading goes on meanwhile)"
            ) from error
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
        try:
            yield
        finally:
            os.ftruncate(descriptor, 0)
    finally:
        os.close(descriptor)
