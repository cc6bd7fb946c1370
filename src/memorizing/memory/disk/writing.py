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
from memorizing.files import FULL_DISK
from memorizing.memory.disk.manifest import SEGMENT_NAME, Manifest

MANIFEST = "manifest.json"
INDEXES = "index"
_TEMPORARY = ".part"


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
    temporary = path.with_name(f".{path.name}{_TEMPORARY}")
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


def remove_leftovers(folder: Path, manifest: Manifest | None) -> None:
    """Remove what writers of before left: temporary files, and segments that are not named.

    Other files are never touched. Whoever calls this holds the lock.
    """
    named = {segment.file for segment in manifest.segments} if manifest else set()
    for path in folder.iterdir():
        inner = path.name.removeprefix(".").removesuffix(_TEMPORARY)
        is_ours = inner == MANIFEST or bool(SEGMENT_NAME.fullmatch(inner))
        is_temporary = is_ours and path.name == f".{inner}{_TEMPORARY}"
        if is_temporary or (SEGMENT_NAME.fullmatch(path.name) and path.name not in named):
            path.unlink(missing_ok=True)
    stems = {file.partition(".")[0] for file in named}
    indexes = folder / INDEXES
    if indexes.is_dir() and not indexes.is_symlink():
        for path in indexes.iterdir():
            is_ours = SEGMENT_NAME.fullmatch(f"{path.name}.safetensors") and not path.is_symlink()
            if is_ours and path.name not in stems:
                shutil.rmtree(path, ignore_errors=True)
