"""Folders that are either wholly there or not at all, and that notice when they were changed."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from memorizing.errors import CheckpointError, ResourceError
from memorizing.storage.files import FULL_DISK

MANIFEST = "manifest.json"
FORMAT_VERSION = 1
TEMPORARY = ".partial-"
"""Begins the name of a folder that is not finished."""


@contextmanager
def explain_full_disk(what: str) -> Iterator[None]:
    """Turn "no space left" into a `ResourceError` that names what could not be written.

    Raises:
        ResourceError: the disk or the quota is full.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        # safetensors writes from Rust and reports the system's error as text.
        number = error.errno if isinstance(error, OSError) else None
        if number in FULL_DISK or any(f"os error {code})" in str(error) for code in FULL_DISK):
            raise ResourceError(
                f"no space left to write {what}; what was saved before is unharmed: free some "
                "space and resume"
            ) from error
        raise


def write_folder(folder: Path, write: Callable[[Path], None], num_bytes: int = 0) -> None:
    """Write a folder so that a crash at any moment leaves all of it or nothing under its name.

    The files go to a temporary folder beside it, with a manifest of their sizes and SHA-256;
    everything is flushed to the disk; then the folder is renamed. A folder that has the name
    already is replaced.

    Args:
        folder: where it ends up.
        write: writes the files into the folder that it is given.
        num_bytes: about how much that will be; refused at once where less is free.

    Raises:
        ResourceError: no space left. The temporary folder is removed.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder.parent).free
    if num_bytes > free:
        raise ResourceError(
            f"{folder} needs {num_bytes / 2**20:,.1f} MiB and {free / 2**20:,.1f} MiB are free; "
            "what was saved before is unharmed: free some space and resume"
        )
    partial = folder.with_name(f"{TEMPORARY}{folder.name}")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        with explain_full_disk(str(folder)):
            partial.mkdir()
            write(partial)
            files = sorted(p for p in partial.iterdir())
            manifest = {
                "format_version": FORMAT_VERSION,
                "files": {p.name: _describe(p) for p in files},
            }
            (partial / MANIFEST).write_text(json.dumps(manifest, indent=2), encoding="utf-8")
            # Some writers make files that only their owner can read.
            mode = (partial / MANIFEST).stat().st_mode
            for path in (*files, partial / MANIFEST):
                path.chmod(mode)
                _sync(path)
            _sync(partial)
            replaced = folder.with_name(f"{TEMPORARY}replaced-{folder.name}")
            if folder.exists():
                folder.rename(replaced)
            partial.rename(folder)
            _sync(folder.parent)
            shutil.rmtree(replaced, ignore_errors=True)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def verify_folder(
    folder: Path, names: Iterable[str] | None = None, *, may_lack_manifest: bool = False
) -> None:
    """Compare files with the manifest: size and SHA-256.

    Args:
        folder: written by `write_folder`.
        names: files that must be there and unchanged; None is every file of the manifest.
        may_lack_manifest: other programs write such folders too (`save_pretrained`): without a
            manifest the files must be there, and what reads them must notice damage.

    Raises:
        CheckpointError: the manifest or a file is missing, truncated or altered.
    """
    if may_lack_manifest and not (folder / MANIFEST).is_file():
        for name in names or ():
            if not (folder / name).is_file():
                raise CheckpointError(
                    f"{folder} has no file {name!r}; copy the whole folder again, or use another "
                    "checkpoint"
                )
        return
    manifest = read_json(folder / MANIFEST)
    if manifest.get("format_version") != FORMAT_VERSION:
        raise CheckpointError(
            f"{folder} has format version {manifest.get('format_version')!r}; this release reads "
            f"version {FORMAT_VERSION}"
        )
    files = manifest.get("files", {})
    for name in files if names is None else names:
        path, expected = folder / name, files.get(name)
        if expected is None or not path.is_file():
            raise CheckpointError(
                f"{folder} has no file {name!r}; copy the whole folder again, or use another "
                "checkpoint"
            )
        size = path.stat().st_size
        if size != expected["bytes"]:
            raise CheckpointError(
                f"{path} is truncated or altered: it has {size:,} bytes and was written with "
                f"{expected['bytes']:,}; use another checkpoint"
            )
        if _describe(path)["sha256"] != expected["sha256"]:
            raise CheckpointError(
                f"{path} was altered: its SHA-256 is not that of the manifest; use another "
                "checkpoint"
            )


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object of ours.

    Raises:
        CheckpointError: missing, or not such a file.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(
            f"{path.parent} is not a checkpoint: it has no {path.name}; give a folder that "
            "training wrote"
        ) from error
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{path} cannot be read ({error}); it is truncated or altered: use another checkpoint"
        ) from error
    if not isinstance(values, dict):
        raise CheckpointError(
            f"{path} does not hold a JSON object; it was altered: use another checkpoint"
        )
    return values


def _describe(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        return {
            "bytes": path.stat().st_size,
            "sha256": hashlib.file_digest(file, "sha256").hexdigest(),
        }


def _sync(path: Path) -> None:
    """Flush a file, or the entries of a folder where the system can, to the disk."""
    if path.is_dir() and not hasattr(os, "O_DIRECTORY"):
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
