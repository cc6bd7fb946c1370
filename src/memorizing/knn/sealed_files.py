"""Sealed blocks on disk: a manifest, and the files of every block and head.

    manifest.json                       format, settings, entries and checksums of every block
    <row>-<first>-<head>-<hash>-<name>  what the library wrote

Files are named by their content, so that saving anew never overwrites what the manifest of before
names; the manifest is replaced when all are there, and then what it does not name is removed.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from memorizing.errors import StateError
from memorizing.knn.index import StoredKeys
from memorizing.storage.files import write_bytes, write_json

_FORMAT = 1
_MANIFEST = "manifest.json"
_OUR_FILES = re.compile(r"\d+-\d+-\d+-[0-9a-f]{16}-[\w.-]+")


@dataclass(frozen=True)
class SavedBlock:
    """A block as it is on disk."""

    row: int
    entries: range
    keys_hash: str
    heads: Iterable[Mapping[str, bytes]]
    """Per head, contents of files by name; made one after the other, for they are large."""


def copy_keys(stored: StoredKeys, row: int, head: int, entries: range) -> Tensor:
    """The keys of consecutive living entries (n, D), contiguous, on the CPU, in their dtype."""
    first, last = entries.start % stored.capacity, entries.stop % stored.capacity
    keys = stored.keys[row, head]
    wraps = first + len(entries) > stored.capacity
    part = torch.cat([keys[first:], keys[:last]]) if wraps else keys[first : first + len(entries)]
    return part.detach().cpu().contiguous()


def hash_keys(stored: StoredKeys, row: int, entries: range) -> str:
    """SHA-256 of the keys of these entries: dtype and shape, then all heads in the order of age."""
    digest = hashlib.sha256()
    _, num_heads, _, dim = stored.keys.shape
    digest.update(f"{stored.keys.dtype} {num_heads} {len(entries)} {dim};".encode())
    for head in range(num_heads):
        keys = copy_keys(stored, row, head, entries)
        digest.update(keys.view(torch.uint8).numpy().data)
    return digest.hexdigest()


def write_blocks(folder: Path, settings: str, blocks: Iterable[SavedBlock]) -> None:
    """Write blocks and manifest; a manifest of before is valid until this one is there.

    Raises:
        ResourceError: a file cannot be written.
    """
    lines = []
    for block in blocks:
        heads = []
        for head, files in enumerate(block.heads):
            named = {}
            for name, content in files.items():
                digest = hashlib.sha256(content).hexdigest()
                path = f"{block.row}-{block.entries.start}-{head}-{digest[:16]}-{name}"
                write_bytes(folder / path, content)
                named[name] = {"path": path, "sha256": digest}
            heads.append(named)
        lines.append(
            {
                "row": block.row,
                "entries": [block.entries.start, block.entries.stop],
                "keys_sha256": block.keys_hash,
                "heads": heads,
            }
        )
    manifest = {"format": _FORMAT, "index": settings, "blocks": lines}
    write_json(folder / _MANIFEST, manifest)
    kept = {file["path"] for line in lines for head in line["heads"] for file in head.values()}
    for path in folder.iterdir():
        if _OUR_FILES.fullmatch(path.name) and path.name not in kept:
            path.unlink()


def read_blocks(
    folder: Path, settings: str, stored: StoredKeys, *, has_files: bool
) -> Iterator[SavedBlock]:
    """Read the blocks of a folder one by one, each compared with its checksums and the keys.

    Args:
        folder: written by `write_blocks`.
        settings: what it must have been written with.
        stored: the keys that it must have been written for.
        has_files: whether the library saves its blocks; otherwise there are ranges only.

    Raises:
        StateError: the folder holds no index, or one of other settings or keys, or a file is
            missing, truncated or altered.
    """
    path = folder / _MANIFEST
    manifest = _read_manifest(path)
    for what, mine in (("format", _FORMAT), ("index", settings)):
        if manifest.get(what) != mine:
            raise StateError(
                f"{str(path)!r} has {what} {manifest.get(what)!r}, expected {mine!r}; open it with "
                "the settings it was saved with, or build the index again from the keys"
            )
    try:
        lines = [
            (
                int(line["row"]),
                range(*map(int, line["entries"])),
                line["keys_sha256"],
                line["heads"],
            )
            for line in manifest["blocks"]
        ]
        lines.sort(key=lambda line: (line[0], line[1].start))
        free_from = dict.fromkeys(range(len(stored.num_appended)), 0)
        for row, entries, keys_hash, heads in lines:
            _check_keys(path, stored, row, entries, free_from.get(row), keys_hash)
            free_from[row] = entries.stop
            if len(heads) != (stored.keys.shape[1] if has_files else 0):
                raise StateError(_describe_damage(path, f"has files of {len(heads)} heads"))
            files = ({name: _read_file(folder, **file) for name, file in h.items()} for h in heads)
            yield SavedBlock(row, entries, keys_hash, files)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise StateError(_describe_damage(path, f"is no manifest of blocks ({error!r})")) from error


def _read_manifest(path: Path) -> dict[str, Any]:
    try:
        manifest = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise StateError(_describe_damage(path, f"cannot be read ({error})")) from error
    if not isinstance(manifest, dict):
        raise StateError(_describe_damage(path, "is no manifest of blocks"))
    return manifest


def _check_keys(
    path: Path, stored: StoredKeys, row: int, entries: range, free_from: int | None, keys_hash: str
) -> None:
    """Refuse a block that is not of the keys that are stored."""
    reason = "a row that the memory does not have"
    if free_from is not None:
        newest = stored.num_appended[row]
        living = range(newest - stored.sizes[row], newest)
        reason = ""
        if not entries or entries[0] not in living or entries[-1] not in living:
            reason = f"of which the memory holds {living.start} to {living.stop}"
        elif entries.start < free_from:
            reason = "which another block has as well"
        elif hash_keys(stored, row, entries) != keys_hash:
            reason = "whose keys in the memory are others"
    if reason:
        raise StateError(
            f"{str(path)!r} has a block of row {row}, entries {entries.start} to {entries.stop}: "
            f"{reason}; open it with the memory it was saved with, or build the index again"
        )


def _read_file(folder: Path, path: str, sha256: str) -> bytes:
    if not _OUR_FILES.fullmatch(path):
        raise StateError(_describe_damage(folder / _MANIFEST, f"names a file {path!r}"))
    try:
        content = (folder / path).read_bytes()
    except OSError as error:
        raise StateError(_describe_damage(folder / path, f"cannot be read ({error})")) from error
    if hashlib.sha256(content).hexdigest() != sha256:
        raise StateError(_describe_damage(folder / path, "is truncated or altered"))
    return content


def _describe_damage(path: Path, what: str) -> str:
    return f"{str(path)!r} {what}; save the index again, or build it again from the keys"
