"""From the segments of a folder to a memory of one layer that can be searched."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path

import torch
from torch import Tensor

from memorizing.errors import ConfigError, MemoryFolderError, StateError
from memorizing.index_settings import IndexSettings, SealedSettings
from memorizing.knn import make_index
from memorizing.knn.sealed_files import DESCRIPTION
from memorizing.memory.disk.contents import Contents
from memorizing.memory.disk.segment import SegmentFile, decode_int8, list_ranges
from memorizing.memory.disk.state import INDEXES
from memorizing.memory.frozen import (
    FrozenBlock,
    FrozenMemory,
    make_block,
    select_heads,
)
from memorizing.memory.store import Memory


@dataclass(frozen=True)
class StoredLayer:
    """The entries of a layer of a folder, of some heads and documents, and what searches them.

    Raises:
        MemoryFolderError: there is no such layer.
        ConfigError: heads that are not there.
    """

    contents: Contents
    layer: int
    settings: IndexSettings
    device: torch.device
    heads: Sequence[int]
    forgotten: Collection[str] = ()
    """Names of documents that are left out, as if the folder did not have them."""

    def __post_init__(self) -> None:
        """Refuse what is not there."""
        description, heads = self.contents.manifest.description, list(self.heads)
        if self.layer not in description.layers:
            raise MemoryFolderError(
                f"{self.contents.folder} has no entries of layer {self.layer}; it has those of "
                f"{list(description.layers)}"
            )
        every = range(description.num_heads)
        if not heads or heads != sorted(set(heads) & set(every)):
            raise ConfigError(
                f"heads are {heads}; give one or more of {list(every)}, in ascending order"
            )

    def open(self) -> FrozenMemory:
        """As `MemoryFolder.open_layer`."""
        # A package that is missing is missed now, and not at the first search.
        make_index(self.settings)
        description = self.contents.manifest.description
        filled = [one for one in self.contents.segments if self._count(one)]
        is_copied = description.dtype == "int8" or self.device.type != "cpu"
        groups = [[segment] for segment in filled]
        # What is copied anyway is searched in one go; indexes that take long to build are saved per
        # segment.
        if is_copied and filled and not isinstance(self.settings, SealedSettings):
            groups = [filled]
        blocks = [
            FrozenBlock(
                sum(map(self._count, group)),
                partial(self._load, group),
                None if is_copied or not self._is_whole(group[0]) else group[0].begin_search,
            )
            for group in groups
        ]
        return FrozenMemory(len(self.heads), description.head_dim, blocks)

    def save_indexes(self) -> None:
        """Build and save what is not saved yet; see `MemoryFolder.save_indexes`."""
        settings = self.settings
        if not (isinstance(settings, SealedSettings) and settings.is_saved):
            return
        for segment in self.contents.segments:
            saved = self._name_index_folder(segment)
            if segment.record.num_entries >= settings.block_len and not (
                (saved / DESCRIPTION).is_file()
            ):
                block = self._load([segment])
                block.index.save(saved, block.stored_keys)

    def _name_index_folder(self, segment: SegmentFile) -> Path:
        """Where the index of these heads of a segment is saved."""
        name, heads = str(self.settings), list(self.heads)
        if len(heads) < self.contents.manifest.description.num_heads:
            name += f" {heads}"
        slug = hashlib.sha256(name.encode()).hexdigest()[:12]
        folder = segment.path.parent / INDEXES / segment.path.stem
        return folder / f"{self.layer}-{self.settings.name}-{slug}"

    @cached_property
    def _ranges(self) -> dict[str, list[tuple[int, int]]]:
        """Per segment, by its file, the entries that are not left out."""
        if not self.forgotten:
            records = [segment.record for segment in self.contents.segments]
            return {one.file: [(0, one.num_entries)] for one in records}
        documents = self.contents.documents
        return {
            segment.record.file: list_ranges(
                segment.take(documents, self.forgotten).documents, "tokens"
            )
            for segment in self.contents.segments
        }

    def _count(self, segment: SegmentFile) -> int:
        return sum(stop - start for start, stop in self._ranges[segment.record.file])

    def _is_whole(self, segment: SegmentFile) -> bool:
        return self._count(segment) == segment.record.num_entries

    def _load(self, segments: Sequence[SegmentFile]) -> Memory:
        keys, values = (self._gather(segments, kind).unsqueeze(0) for kind in ("key", "value"))
        is_saved = len(segments) == 1 and self._is_whole(segments[0])
        saved = self._name_index_folder(segments[0]) if is_saved else None
        block = make_block(keys, values, self.settings, saved and partial(self._restore, saved))
        if isinstance(self.settings, SealedSettings):
            # Few of the keys that an index was made of are read again.
            for segment in segments:
                segment.let_go()
        return block

    def _gather(self, segments: Sequence[SegmentFile], kind: str) -> Tensor:
        """Keys or values (H, n, D) of the segments, by reference if possible."""
        description, name = self.contents.manifest.description, f"layers.{self.layer}.{kind}"
        is_coded = description.dtype == "int8"

        def get(segment: SegmentFile, part: str) -> Tensor:
            lines = select_heads(segment.get_tensor(f"{name}{part}"), self.heads)
            if not self._is_whole(segment):
                ranges = self._ranges[segment.record.file]
                lines = torch.cat([lines[:, start:stop] for start, stop in ranges], 1)
            return lines.to(self.device)

        if len(segments) == 1 and not is_coded:
            return get(segments[0], "s")
        shape = (len(self.heads), sum(map(self._count, segments)), description.head_dim)
        gathered = torch.empty(shape, dtype=description.searched_dtype, device=self.device)
        start = 0
        for segment in segments:
            stop = start + self._count(segment)
            stored = get(segment, "s")
            if is_coded:
                stored = decode_int8(stored, get(segment, "_factors"), gathered.dtype)
            gathered[:, start:stop] = stored
            start = stop
        return gathered

    def _restore(self, saved: Path, block: Memory) -> bool:
        """Take over an index that was saved for these keys, if there is one."""
        if not saved.is_dir():
            return False
        if self.contents.folder.resolve() not in saved.resolve().parents:
            raise MemoryFolderError(f"{saved} is a link out of the memory; remove it")
        try:
            block.index.load(saved, block.stored_keys)
        except StateError as error:
            warnings.warn(
                f"the index in {saved} is not used, and built anew from the entries ({error}); "
                "remove that folder, and MemoryFolder.save_indexes saves it again",
                stacklevel=2,
            )
            return False
        return True
