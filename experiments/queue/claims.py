"""A job is done by one worker at a time, also where a worker was killed."""

from __future__ import annotations

from contextlib import AbstractContextManager
from pathlib import Path

from memorizing.storage.locks import try_lock


def claim(run_dir: Path) -> AbstractContextManager[bool]:
    """Hold a job; False where another worker holds it. Freed when the process ends."""
    run_dir.parent.mkdir(parents=True, exist_ok=True)
    return try_lock(_locate_lock(run_dir))


def is_claimed(run_dir: Path) -> bool:
    """Whether a worker holds it now."""
    if not _locate_lock(run_dir).exists():
        return False
    with claim(run_dir) as is_free:
        return not is_free


def _locate_lock(run_dir: Path) -> Path:
    return run_dir.with_name(f"{run_dir.name}.lock")
