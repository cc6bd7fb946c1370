"""One writer at a time. Readers take no lock."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

from filelock import FileLock, Timeout

from memorizing.errors import MemorizingError

LOCK = "lock"
"""Name of the lock file of a folder. It stays when the lock is free."""


@contextlib.contextmanager
def hold_lock(
    folder: Path, error: type[MemorizingError], *, remedy: str = "", file: Path | None = None
) -> Iterator[None]:
    """Be the only writer of a folder for a while, or be refused at once.

    The system releases the lock when the process ends, however it ends. A thread of the same
    process is refused as another process is; a forked child does not have the lock of its parent.

    Args:
        folder: which must be there.
        error: what is raised where another holds it.
        remedy: what to do then.
        file: the lock file, where it is not in the folder.

    Raises:
        MemorizingError: of the given class; the message names who holds it, and since when.
        OSError: the lock file cannot be written.
    """
    path = folder / LOCK if file is None else file
    lock = FileLock(path, thread_local=False)
    try:
        lock.acquire(blocking=False)
    except Timeout as cause:
        raise error(
            f"{folder} is being written by {_read_owner(path)}; only one may write at a time: "
            f"{remedy or 'wait until it is done (reading goes on meanwhile)'}"
        ) from cause
    try:
        now = datetime.now(UTC).isoformat(timespec="seconds")
        _note(path, f"process {os.getpid()} on {socket.gethostname()} since {now}\n")
        yield
    finally:
        # Not in a child that was forked meanwhile.
        if lock.is_locked:
            _note(path, "")
            lock.release()


def is_locked(folder: Path, *, file: Path | None = None) -> bool:
    """Whether somebody holds the lock of a folder now. Nothing is made."""
    path = folder / LOCK if file is None else file
    if not path.is_file():
        return False
    lock = FileLock(path, thread_local=False)
    try:
        lock.acquire(blocking=False)
    except Timeout:
        return True
    lock.release()
    return False


def _read_owner(path: Path) -> str:
    with contextlib.suppress(OSError):
        return path.read_bytes()[:200].decode(errors="replace").strip() or "a process"
    return "a process"


def _note(path: Path, text: str) -> None:
    """Say in the lock file who holds it; a disk that is full keeps nobody from freeing space."""
    with contextlib.suppress(OSError):
        path.write_text(text, encoding="utf-8")
