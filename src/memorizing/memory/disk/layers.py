"""From the segments of a folder to a memory of one layer that can be searched."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from memorizing.errors import ConfigError, MemoryFolderError, StateError
from memorizing.index_settings import ExactSettings, IndexSettings, SealedSettings
from memorizing.knn import KeyIndex, StoredKeys, make_index
from memorizing.knn.sealed_files import DESCRIPTION
from memorizing.memory.disk.contents import Contents
from memorizing.memory.disk.segment import SegmentFile, decode_int8
from memorizing.memory.disk.state import INDEXES
from memorizing.memory.frozen import (
    FrozenBlock,
    FrozenMemory,
    LoadedBlock,
    index_block,
    select_heads,
)


def open_layer(
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
            f"{contents.folder} has no entries of layer {layer}; it has those of "
            f"{list(description.layers)}"
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
            partial(_load, contents, group, layer, device, settings, heads),
            None if is_copied else group[0].check_size,
        )
        for group in groups
    ]
    return FrozenMemory(len(heads), description.head_dim, blocks)


def save_indexes(contents: Contents, index: IndexSettings) -> None:
    """Build and save what is not saved yet; see `MemoryFolder.save_indexes`."""
    if not (isinstance(index, SealedSettings) and index.is_saved):
        return
    description = contents.manifest.description
    for segment in contents.segments:
        for layer in description.layers:
            saved = _name_index_folder(segment, layer, index)
            if segment.record.num_entries < index.block_len or (saved / DESCRIPTION).is_file():
                continue
            heads = range(description.num_heads)
            block = _load(contents, [segment], layer, torch.device("cpu"), index, heads)
            block.index.save(saved)


def _name_index_folder(segment: SegmentFile, layer: int, settings: IndexSettings) -> Path:
    """Where the index of a layer of a segment is saved."""
    slug = hashlib.sha256(str(settings).encode()).hexdigest()[:12]
    folder = segment.path.parent / INDEXES / segment.path.stem
    return folder / f"{layer}-{settings.name}-{slug}"


def _load(
    contents: Contents,
    segments: Sequence[SegmentFile],
    layer: int,
    device: torch.device,
    settings: IndexSettings,
    heads: Sequence[int],
) -> LoadedBlock:
    keys, values = (
        _gather(contents, segments, f"layers.{layer}.{kind}", device, heads).unsqueeze(0)
        for kind in ("key", "value")
    )
    restore = None
    if len(segments) == 1:
        saved = _name_index_folder(segments[0], layer, settings)
        restore = partial(_restore, contents.folder, saved)
    return index_block(keys, values, settings, restore)


def _gather(
    contents: Contents,
    segments: Sequence[SegmentFile],
    name: str,
    device: torch.device,
    heads: Sequence[int],
) -> Tensor:
    """Keys or values (H, n, D) of the segments, by reference if possible; `heads` of them."""
    description = contents.manifest.description
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
        warnings.warn(
            f"the index in {saved} is not used, and built anew from the entries ({error}); remove "
            "that folder, and MemoryFolder.save_indexes saves it again",
            stacklevel=2,
        )
        return False
    return True
