"""Sealed blocks on disk: numbers and text only, so that a folder of somebody else runs no code.

index.json                  format, settings, and row, entries and keys of every block
<row>-<first>.safetensors   per head, the arrays that the library needs beside the keys
manifest.json               sizes and SHA-256 of these files
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from memorizing.errors import StateError
from memorizing.knn.index import StoredKeys
from memorizing.storage.files import read_json, write_json
from memorizing.storage.folders import verify_folder, write_folder
from memorizing.storage.tensors import read_tensors, write_tensors

_FORMAT = 2
DESCRIPTION = "index.json"
_OUR_FILES = re.compile(r"index\.json|\d+-\d+\.safetensors|\d+-\d+-\d+-[0-9a-f]{16}-[\w.-]+")
_REMEDY = "save the index again, or build it again from the keys"


@dataclass(frozen=True)
class SavedBlock:
    """A block as it is on disk."""

    row: int
    entries: range
    keys_hash: str
    heads: Sequence[Mapping[str, np.ndarray]]
    """Per head, arrays by name."""


def copy_keys(stored: StoredKeys, row: int, head: int, entries: range) -> Tensor:
    """The keys of consecutive living entries (n, D), contiguous, on the CPU, perhaps a view."""
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


def write_blocks(folder: Path, settings: str, blocks: Sequence[SavedBlock]) -> None:
    """Write a folder of blocks, in one step; what is not ours in it stays.

    Raises:
        ResourceError: a file cannot be written.
    """
    lines = [
        {
            "row": block.row,
            "entries": [block.entries.start, block.entries.stop],
            "keys_sha256": block.keys_hash,
        }
        for block in blocks
    ]

    def write(partial: Path) -> None:
        write_json(partial / DESCRIPTION, {"format": _FORMAT, "index": settings, "blocks": lines})
        for block in blocks:
            arrays = {
                f"{head}.{name}": torch.from_numpy(array)
                for head, named in enumerate(block.heads)
                for name, array in named.items()
            }
            if arrays:
                write_tensors(partial / _name_file(block.row, block.entries), arrays)

    old = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    write_folder(folder, write, ours=[name for name in old if _OUR_FILES.fullmatch(name)])


def read_blocks(folder: Path, settings: str, stored: StoredKeys) -> Iterator[SavedBlock]:
    """Read the blocks of a folder one by one, each compared with its checksums and the keys.

    Args:
        folder: written by `write_blocks`.
        settings: what it must have been written with.
        stored: the keys that it must have been written for.

    Raises:
        StateError: the folder holds no index, or one of other settings or keys, or a file is
            missing, truncated or altered.
    """
    path = folder / DESCRIPTION
    missing = f"{folder} holds no index that this release reads; {_REMEDY}"
    if (folder / "manifest.json").is_file():
        missing = (
            f"{folder} holds an index of an older release, in files that may run code or harm when "
            f"they are read, or is not whole; {_REMEDY}"
        )
    description = read_json(path, StateError, _REMEDY, missing=missing)
    for what, mine in (("format", _FORMAT), ("index", settings)):
        if description.get(what) != mine:
            raise StateError(
                f"{str(path)!r} has {what} {description.get(what)!r}, expected {mine!r}; open it "
                "with the settings it was saved with, or build the index again from the keys"
            )
    verify_folder(folder, error=StateError, remedy=_REMEDY)
    free_from = dict.fromkeys(range(len(stored.num_appended)), 0)
    for row, entries, keys_hash in _parse_lines(path, description.get("blocks")):
        _check_keys(path, stored, row, entries, free_from.get(row), keys_hash)
        free_from[row] = entries.stop
        file = folder / _name_file(row, entries)
        heads: list[dict[str, np.ndarray]] = [{} for _ in range(stored.keys.shape[1])]
        found = read_tensors(file, StateError, _REMEDY) if file.is_file() else {}
        for name, tensor in found.items():
            head, _, name = name.partition(".")
            if not head.isdecimal() or int(head) >= len(heads):
                raise StateError(f"{file} has arrays of head {head!r}; {_REMEDY}")
            heads[int(head)][name] = tensor.numpy()
        yield SavedBlock(row, entries, keys_hash, heads)


def _name_file(row: int, entries: range) -> str:
    return f"{row}-{entries.start}.safetensors"


def _parse_lines(path: Path, lines: Any) -> list[tuple[int, range, str]]:
    """Row, entries and hash of every block, in order."""
    try:
        parsed = []
        for line in lines:
            first, until = line["entries"]
            parsed.append((int(line["row"]), range(int(first), int(until)), line["keys_sha256"]))
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise StateError(
            f"{str(path)!r} does not describe blocks ({error!r}); {_REMEDY}"
        ) from error
    return sorted(parsed, key=lambda line: (line[0], line[1].start))


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
