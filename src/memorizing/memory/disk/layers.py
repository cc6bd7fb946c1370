"""From the segments of a folder to a memory of one layer that can be searched."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from memorizing.errors import ConfigError, MemoryFolderError, StateError
from memorizing.index_settings import ExactSettings, IndexSettings, SealedSettings
from memorizing.knn import KeyIndex, StoredKeys, make_index
from memorizing.memory.disk.contents import Contents
from memorizing.memory.disk.description import FolderDescription
from memorizing.memory.disk.encoding import decode_int8
from memorizing.memory.disk.segment import SegmentFile
from memorizing.memory.disk.writing import INDEXES, TEMPORARY, sync_folder
from memorizing.memory.frozen import (
    FrozenBlock,
    FrozenMemory,
    LoadedBlock,
    index_block,
    select_heads,
)


def open_layer(
    folder: Path,
    contents: Contents,
    layer: int,
    device: torch.device | str = "cpu",
    index: IndexSettings | None = None,
    heads: Sequence[int] | None = None,
) -> FrozenMemory:
    """The entries of one layer; see `MemoryFolder.open_layer`."""
    description = contents.manifest.description
    if layer not in description.layers:
        raise MemoryFolderError(
            f"{folder} has no entries of layer {layer}; it has those of {list(description.layers)}"
        )
    settings = ExactSettings() if index is None else index
    every = range(description.num_heads)
    heads = every if heads is None else heads
    if not heads or list(heads) != sorted(set(heads) & set(every)):
        raise ConfigError(
            f"heads are {list(heads)}; give one or more of {list(every)}, in ascending order"
        )
    if len(heads) < len(every) and isinstance(settings, SealedSettings):
        raise ConfigError(
            f"index {settings.name!r} is saved with all {description.num_heads} heads, and heads "
            f"{list(heads)} are asked for; leave heads out"
        )
    # A package that is missing is missed now, and not at the first search.
    make_index(settings)
    device = torch.device(device)
    filled = [one for one in contents.segments if one.record.num_entries]
    is_copied = description.dtype == "int8" or device.type != "cpu"
    # What is copied anyway is searched in one go; indexes that take long to build are saved per
    # segment.
    if is_copied and filled and not isinstance(settings, SealedSettings):
        groups = [filled]
    else:
        groups = [[segment] for segment in filled]
    blocks = [
        FrozenBlock(
            sum(segment.record.num_entries for segment in group),
            partial(_load, folder, description, group, layer, device, settings, heads),
        )
        for group in groups
    ]
    return FrozenMemory(len(heads), description.head_dim, blocks)


def save_indexes(folder: Path, contents: Contents, index: IndexSettings) -> None:
    """Build and save what is not saved yet; see `MemoryFolder.save_indexes`."""
    if not isinstance(index, SealedSettings):
        return
    for segment in contents.segments:
        if segment.record.num_entries < index.block_len:
            continue
        for layer in contents.manifest.description.layers:
            saved = name_index_folder(folder, segment.record.file, layer, index)
            if saved.exists():
                continue
            block = _load(
                folder,
                contents.manifest.description,
                [segment],
                layer,
                torch.device("cpu"),
                index,
                range(contents.manifest.description.num_heads),
            )
            unfinished = saved.with_name(f".{saved.name}{TEMPORARY}")
            block.index.save(unfinished)
            os.replace(unfinished, saved)
            sync_folder(saved.parent)


def name_index_folder(folder: Path, file: str, layer: int, settings: IndexSettings) -> Path:
    """Where the index of a layer of a segment is saved."""
    slug = hashlib.sha256(str(settings).encode()).hexdigest()[:12]
    return folder / INDEXES / file.partition(".")[0] / f"{layer}-{settings.name}-{slug}"


def _load(
    folder: Path,
    description: FolderDescription,
    segments: Sequence[SegmentFile],
    layer: int,
    device: torch.device,
    settings: IndexSettings,
    heads: Sequence[int],
) -> LoadedBlock:
    keys, values = (
        _gather(description, segments, f"layers.{layer}.{kind}", device, heads)
        for kind in ("key", "value")
    )
    saved = name_index_folder(folder, segments[0].record.file, layer, settings)
    restore = partial(_restore, folder, saved) if len(segments) == 1 else None
    return index_block(keys.unsqueeze(0), values.unsqueeze(0), settings, restore)


def _gather(
    description: FolderDescription,
    segments: Sequence[SegmentFile],
    name: str,
    device: torch.device,
    heads: Sequence[int],
) -> Tensor:
    """Keys or values (H, n, D) of the segments, by reference if possible; `heads` of them."""
    is_coded = description.dtype == "int8"
    if len(segments) == 1 and not is_coded:
        return select_heads(segments[0].get_tensor(f"{name}s"), heads).to(device)
    num_entries = sum(segment.record.num_entries for segment in segments)
    shape = (len(heads), num_entries, description.head_dim)
    gathered = torch.empty(shape, dtype=description.searched_dtype, device=device)
    start = 0
    for segment in segments:
        stop = start + segment.record.num_entries
        stored = select_heads(segment.get_tensor(f"{name}s"), heads).to(device)
        if is_coded:
            factors = select_heads(segment.get_tensor(f"{name}_factors"), heads).to(device)
            stored = decode_int8(stored, factors, gathered.dtype)
        gathered[:, start:stop] = stored
        start = stop
    return gathered


def _restore(folder: Path, saved: Path, index: KeyIndex, stored: StoredKeys) -> bool:
    """Take over an index that was saved for these keys, if there is one."""
    if not saved.is_dir():
        return False
    if folder.resolve() not in saved.resolve().parents:
        raise MemoryFolderError(f"{saved} is a link out of the memory; remove it")
    try:
        index.load(saved, stored)
    except StateError as error:
        raise MemoryFolderError(
            f"the index in {saved} is refused ({error}); remove that folder, and it is built anew"
        ) from error
    return True
