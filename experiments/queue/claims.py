"""A job is done by one worker at a time, also where a worker was killed."""

from __future__ import annotations

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def claim(run_dir: Path) -> Iterator[bool]:
    """Hold a job; False where another worker holds it. Freed when the process ends."""
    run_dir.parent.mkdir(parents=True, exist_ok=True)
    with _locate_lock(run_dir).open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        yield True


def is_claimed(run_dir: Path) -> bool:
    """Whether a worker holds it now."""
    if not _locate_lock(run_dir).exists():
        return False
    with claim(run_dir) as is_free:
        return not is_free


def _locate_lock(run_dir: Path) -> Path:
    return run_dir.with_name(f"{run_dir.name}.lock")
