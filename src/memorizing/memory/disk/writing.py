"""Files that are whole or not there, also after the power fails.

A file is written under a temporary name, synced and renamed; then its folder is synced.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

from memorizing.errors import ResourceError
from memorizing.memory.disk.manifest import SEGMENT_NAME, Manifest
from memorizing.storage.files import FULL_DISK

MANIFEST = "manifest.json"
INDEXES = "index"
TEMPORARY = ".part"
"""Ends the names of what is not complete."""


@contextlib.contextmanager
def explain_failures(folder: Path) -> Iterator[None]:
    """Turn errors of the system while writing into ours.

    Raises:
        ResourceError: there is no space left, or the folder cannot be written.
    """
    try:
        yield
    except ResourceError:
        raise
    except OSError as error:
        what = "no space left" if error.errno in FULL_DISK else error.strerror or str(error)
        raise ResourceError(
            f"cannot write the memory {folder}: {what}; what it held is still whole: free space "
            "or choose another folder"
        ) from error


def write_whole(path: Path, content: Iterable[bytes | memoryview]) -> str:
    """Write a file piece by piece and return its SHA-256; on errors nothing is left behind."""
    digest = hashlib.sha256()
    temporary = path.with_name(f".{path.name}{TEMPORARY}")
    try:
        with temporary.open("wb") as file:
            for piece in content:
                file.write(piece)
                digest.update(piece)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
    sync_folder(path.parent)
    return digest.hexdigest()


def sync_folder(folder: Path) -> None:
    """Make the names in a folder last."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove_leftovers(folder: Path, manifest: Manifest) -> None:
    """Remove what writers of before left: temporary files, and segments that are not named.

    Files that are not ours are never touched. Whoever calls this holds the lock.
    """
    named = {segment.file for segment in manifest.segments}
    stems = {file.partition(".")[0] for file in named}
    for path in folder.iterdir():
        if is_temporary(path.name) or (
            SEGMENT_NAME.fullmatch(path.name) and path.name not in named
        ):
            path.unlink(missing_ok=True)
    indexes = folder / INDEXES
    if not indexes.is_dir() or indexes.is_symlink():
        return
    for path in indexes.iterdir():
        is_folder = path.is_dir() and not path.is_symlink()
        if not is_folder or not SEGMENT_NAME.fullmatch(f"{path.name}.safetensors"):
            continue
        if path.name not in stems:
            shutil.rmtree(path)
            continue
        for saved in path.iterdir():
            if saved.name.endswith(TEMPORARY):
                shutil.rmtree(saved)


def is_temporary(name: str) -> bool:
    """Whether a file of this name was left by a writer that was interrupted."""
    inner = name.removeprefix(".").removesuffix(TEMPORARY)
    is_ours = inner == MANIFEST or SEGMENT_NAME.fullmatch(inner)
    return bool(is_ours) and name == f".{inner}{TEMPORARY}"


def remove_ours(folder: Path) -> None:
    """Remove all files of a memory but the lock."""
    for path in folder.iterdir():
        if path.name == MANIFEST or is_temporary(path.name) or SEGMENT_NAME.fullmatch(path.name):
            path.unlink(missing_ok=True)
