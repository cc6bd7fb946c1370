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
def try_lock(file: Path) -> Iterator[bool]:
    """Hold a lock while the block runs; False where another process or thread holds it.

    The system releases it when the process ends, however it ends. A forked child does not have the
    lock of its parent.

    Args:
        file: the lock file, in which stands who holds it, and since when.

    Raises:
        OSError: it cannot be written.
    """
    lock = FileLock(file, thread_local=False)
    try:
        lock.acquire(blocking=False)
    except Timeout:
        yield False
        return
    try:
        now = datetime.now(UTC).isoformat(timespec="seconds")
        _note(file, f"process {os.getpid()} on {socket.gethostname()} since {now}\n")
        yield True
    finally:
        # Not in a child that was forked meanwhile.
        if lock.is_locked:
            _note(file, "")
            lock.release()


@contextlib.contextmanager
def hold_lock(folder: Path, error: type[MemorizingError], *, remedy: str = "") -> Iterator[None]:
    """Be the only writer of a folder while the block runs, or be refused at once; see `try_lock`.

    Args:
        folder: which must be there.
        error: what is raised where another holds it.
        remedy: what to do then.

    Raises:
        MemorizingError: of the given class; the message names who holds it, and since when.
        OSError: the lock file cannot be written.
    """
    with try_lock(folder / LOCK) as is_mine:
        if not is_mine:
            owner = (folder / LOCK).read_bytes()[:200].decode(errors="replace").strip()
            raise error(
                f"{folder} is being written by {owner or 'a process'}; only one may write at a "
                f"time: {remedy or 'wait until it is done (reading goes on meanwhile)'}"
            )
        yield


def is_locked(folder: Path) -> bool:
    """Whether somebody holds the lock of a folder now. Nothing is made."""
    if not (folder / LOCK).is_file():
        return False
    with try_lock(folder / LOCK) as is_free:
        return not is_free


def _note(path: Path, text: str) -> None:
    # A disk that is full keeps nobody from freeing space.
    with contextlib.suppress(OSError):
        path.write_text(text, encoding="utf-8")
