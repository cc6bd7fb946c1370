"""Folders that are either wholly there or not at all, and that notice when they were changed."""

from __future__ import annotations

import ctypes
import errno
import hashlib
import os
import shutil
from collections.abc import Callable, Collection, Iterable
from pathlib import Path
from typing import Any

from memorizing.errors import CheckpointError, MemorizingError, ResourceError
from memorizing.storage.files import (
    explain_failures,
    name_temporary,
    read_json,
    remove_leftovers,
    sync,
    write_json,
)

MANIFEST = "manifest.json"
FORMAT_VERSION = 1

_AT_FDCWD = -100
_RENAME_EXCHANGE = 2
_NO_EXCHANGE = (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP)
"""What systems answer that cannot exchange two names at once."""


def write_folder(
    folder: Path,
    write: Callable[[Path], None],
    num_bytes: int = 0,
    *,
    ours: Collection[str] | None = None,
) -> None:
    """Write a folder so that a kill at any moment leaves the old one or the new one under its name.

    The files go to a temporary folder beside it, with a manifest of their sizes and SHA-256;
    everything is flushed to the disk; then it takes the name, and what had it is removed. What
    writers that were killed left beside it is removed first.

    Args:
        folder: where it ends up; a link to a folder is followed.
        write: writes the files into the folder that it is given.
        num_bytes: about how much that will be; refused at once where less is free.
        ours: names of what an old folder may hold that is not to stay; everything else in it stays.
            None is everything.

    Raises:
        ResourceError: no space left, or the place cannot be written. The old folder is untouched.
    """
    folder = Path(os.path.realpath(folder))
    with explain_failures(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        remove_leftovers(folder.parent)
        free = shutil.disk_usage(folder.parent).free
        if num_bytes > free:
            raise ResourceError(
                f"{folder} needs {num_bytes / 2**20:,.1f} MiB and {free / 2**20:,.1f} MiB are "
                "free; what was saved before is unharmed: free some space, or choose another folder"
            )
        with name_temporary(folder.parent) as partial:
            partial.mkdir()
            write(partial)
            files = sorted(path for path in partial.iterdir() if path.name != MANIFEST)
            manifest = {
                "format_version": FORMAT_VERSION,
                "files": {path.name: _describe(path) for path in files},
            }
            write_json(partial / MANIFEST, manifest)
            # Some writers make files that only their owner can read.
            mode = (partial / MANIFEST).stat().st_mode
            for path in files:
                path.chmod(mode)
                sync(path)
            if ours is not None and folder.is_dir():
                _link_others(folder, partial, {*ours, MANIFEST})
            sync(partial)
            replace_folder(partial, folder)


def replace_folder(new: Path, folder: Path) -> None:
    """Give a folder the name of another one, in one step where the system can.

    What had the name is removed afterwards. Where two names cannot be exchanged at once (not on
    Linux, or over a network), a kill between two steps leaves the old folder under a temporary
    name, which `remove_leftovers` turns back.

    Raises:
        OSError: it cannot be done; the old one is there as it was.
    """
    if not os.path.lexists(folder):
        os.rename(new, folder)
    elif not _exchange(new, folder):
        with name_temporary(folder.parent, f"was-{folder.name}") as old:
            os.rename(folder, old)
            try:
                os.rename(new, folder)
            except BaseException:
                os.rename(old, folder)
                raise
    sync(folder.parent)
    if os.path.lexists(new):
        shutil.rmtree(new, ignore_errors=True)


def verify_folder(
    folder: Path,
    names: Iterable[str] | None = None,
    *,
    may_lack_manifest: bool = False,
    error: type[MemorizingError] = CheckpointError,
    remedy: str = "copy the whole folder again, or use another checkpoint",
) -> None:
    """Compare files with the manifest: size and SHA-256.

    Args:
        folder: written by `write_folder`.
        names: files that must be there and unchanged; None is every file of the manifest.
        may_lack_manifest: other programs write such folders too (`save_pretrained`): without a
            manifest the files must be there, and what reads them must notice damage.
        error: what is raised.
        remedy: what to do; the end of the messages.

    Raises:
        MemorizingError: of the given class: the manifest or a file is missing, truncated or
            altered.
    """
    files: dict[str, Any] = {}
    is_checked = not may_lack_manifest or (folder / MANIFEST).is_file()
    if is_checked:
        files = read_manifest(folder, error, remedy)
    for name in files if names is None else names:
        path, expected = folder / name, files.get(name)
        if not path.is_file() or (is_checked and expected is None):
            raise error(f"{folder} has no file {name!r}; {remedy}")
        if expected is None:
            continue
        size = path.stat().st_size
        if size != expected["bytes"]:
            raise error(
                f"{path} is truncated or altered: it has {size:,} bytes and was written with "
                f"{expected['bytes']:,}; {remedy}"
            )
        if _describe(path)["sha256"] != expected["sha256"]:
            raise error(f"{path} was altered: its SHA-256 is not that of the manifest; {remedy}")


def read_manifest(folder: Path, error: type[MemorizingError], remedy: str) -> dict[str, Any]:
    """What the manifest of a folder knows of every file, by name.

    Raises:
        MemorizingError: of the given class: it is missing or damaged.
    """
    missing = f"{folder} is not whole, or of another kind: it has no {MANIFEST}; {remedy}"
    manifest = read_json(folder / MANIFEST, error, remedy, missing=missing)
    if manifest.get("format_version") != FORMAT_VERSION:
        raise error(
            f"{folder} has format version {manifest.get('format_version')!r}; this release reads "
            f"version {FORMAT_VERSION}"
        )
    match manifest.get("files"):
        case dict() as files if all(map(_is_known, files.items())):
            return files
    raise error(f"{folder / MANIFEST} does not describe files: it was altered; {remedy}")


def _is_known(item: tuple[str, Any]) -> bool:
    match item:
        case name, {"bytes": int(), "sha256": str()}:
            return Path(name).name == name
    return False


def _describe(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        return {
            "bytes": path.stat().st_size,
            "sha256": hashlib.file_digest(file, "sha256").hexdigest(),
        }


def _link_others(folder: Path, partial: Path, ours: Collection[str]) -> None:
    """Let a new folder have what is not ours in the old one, without copying where possible."""

    def link(source: str, target: str) -> None:
        try:
            os.link(source, target, follow_symlinks=False)
        except OSError:
            shutil.copy2(source, target, follow_symlinks=False)

    for path in folder.iterdir():
        if path.name in ours or os.path.lexists(partial / path.name):
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.copytree(path, partial / path.name, symlinks=True, copy_function=link)
        else:
            link(str(path), str(partial / path.name))


def _exchange(first: Path, second: Path) -> bool:
    """Let two names change places in one step, or say that the system cannot."""
    call = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if call is None:
        return False
    paths = os.fsencode(first), os.fsencode(second)
    if call(_AT_FDCWD, paths[0], _AT_FDCWD, paths[1], _RENAME_EXCHANGE) == 0:
        return True
    number = ctypes.get_errno()
    if number in _NO_EXCHANGE:
        return False
    raise OSError(number, os.strerror(number), str(second))


def count_bytes(folder: Path) -> int:
    """Of all files in a folder."""
    return sum(file.lstat().st_size for file in folder.rglob("*") if file.is_file())
