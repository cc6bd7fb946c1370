"""A memory that is only read: entries in one or more blocks, the same for every row of a batch.

Shapes: B rows, H heads, G heads of queries per head of the memory, T queries, n entries of a block,
D head_dim, k neighbors.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from memorizing.errors import StateError
from memorizing.index_settings import ExactSettings, IndexSettings, SealedSettings
from memorizing.knn import KeyIndex, Neighbors, StoredKeys, make_index
from memorizing.knn.index import check_queries
from memorizing.memory.retrieved import Retrieved, keep_best


@dataclass(frozen=True)
class LoadedBlock:
    """Entries that are ready to be searched."""

    keys: Tensor
    """(1, H, n, D), contiguous."""
    values: Tensor
    """(1, H, n, D), contiguous."""
    index: KeyIndex

    @property
    def stored_keys(self) -> StoredKeys:
        """The keys as an index sees them."""
        return StoredKeys(self.keys, (self.keys.shape[2],))


class FrozenBlock:
    """Consecutive entries that are searched together, loaded at their first search."""

    def __init__(
        self,
        num_entries: int,
        load: Callable[[], LoadedBlock],
        check: Callable[[], object] | None = None,
    ) -> None:
        """Take what loads them, which is called once, and what checks them before each search."""
        self.num_entries = num_entries
        self._load = load
        self._check = check
        self._loaded: LoadedBlock | None = None
        self._lock = threading.Lock()

    def load(self) -> LoadedBlock:
        """The entries; those that were loaded by the first call."""
        if self._check is not None:
            self._check()
        # Tensors made in inference mode could not be used with gradients outside of it.
        with self._lock, torch.inference_mode(False):
            if self._loaded is None:
                self._loaded = self._load()
            return self._loaded


def index_block(
    keys: Tensor,
    values: Tensor,
    settings: IndexSettings,
    restore: Callable[[KeyIndex, StoredKeys], bool] | None = None,
) -> LoadedBlock:
    """Entries (1, H, n, D) with their index, which is restored or built. May take minutes.

    With an index of another library, fewer entries than one of its blocks are searched exactly, as
    those that wait for a block in a memory that grows.

    Args:
        keys: what is searched.
        values: what is found.
        settings: of the index.
        restore: takes an index over from where it was saved, or says that there is none.
    """
    block = LoadedBlock(keys, values, make_index(settings))
    if restore is not None and restore(block.index, block.stored_keys):
        return block
    if not isinstance(settings, SealedSettings):
        block.index.append(block.stored_keys)
    elif keys.shape[2] >= settings.block_len:
        block.index.seal(block.stored_keys)
    return block


class FrozenMemory:
    """Entries of one layer that never change, oldest first, shared by all rows.

    They lie in blocks, which are searched one by one. Entry e of the memory, counted from 0, is in
    slot `e - first_entries[p]` of block p.
    """

    def __init__(self, num_heads: int, head_dim: int, blocks: Sequence[FrozenBlock]) -> None:
        """Take blocks with entries of so many heads and such keys; see `from_tensors`."""
        self.num_heads = num_heads
        self.head_dim = head_dim
        self.blocks = tuple(block for block in blocks if block.num_entries)
        self._num_changes = torch.zeros((), dtype=torch.int64)

    @classmethod
    def from_tensors(
        cls,
        keys: Tensor,
        values: Tensor,
        index: IndexSettings | None = None,
        *,
        heads: Sequence[int] | None = None,
    ) -> FrozenMemory:
        """A memory of keys and values (H, n, D), which are not copied where they are contiguous.

        Of `heads`, where they are given, ascending; they are copied at the first search unless they
        are neighbors.

        Raises:
            StateError: keys and values of different shapes.
            IndexUnavailableError: the index needs a package that is not installed.
        """
        if keys.dim() != 3 or keys.shape != values.shape:
            raise StateError(
                f"keys are {tuple(keys.shape)} and values {tuple(values.shape)}; both must be "
                "(heads, n, head_dim)"
            )
        settings = ExactSettings() if index is None else index
        # A package that is missing is missed now, and not at the first search.
        make_index(settings)
        block = FrozenBlock(
            keys.shape[1],
            lambda: index_block(
                select_heads(keys.detach(), heads).contiguous().unsqueeze(0),
                select_heads(values.detach(), heads).contiguous().unsqueeze(0),
                settings,
            ),
        )
        return cls(keys.shape[0] if heads is None else len(heads), keys.shape[2], [block])

    @property
    def size(self) -> int:
        """Entries."""
        return sum(block.num_entries for block in self.blocks)

    @property
    def first_entries(self) -> tuple[int, ...]:
        """Per block, the number of its first entry."""
        counts = [block.num_entries for block in self.blocks]
        return tuple(sum(counts[:place]) for place in range(len(counts)))

    def prepare(self) -> None:
        """Load everything now, and not at the first search. May take minutes.

        Raises:
            MemoryFolderError: the memory comes from a folder, and a file of it is damaged.
        """
        for block in self.blocks:
            block.load()

    def retrieve(
        self, queries: Tensor, num_neighbors: int, is_open: Tensor | None = None
    ) -> tuple[Retrieved, ...]:
        """Find the nearest entries of every query (B, H * G, T, D); all rows search all entries.

        Args:
            queries: as those of `Memory.retrieve`. No gradient flows through the search.
            num_neighbors: k, over all blocks together.
            is_open: (B,) bool: rows that read; the others find nothing. None is all.

        Returns:
            One `Retrieved` per block, in their order; in all of them together, the k best of every
            query are valid. Empty for a memory without entries.

        Raises:
            StateError: queries of other heads, NaN or infinite.
            MemoryFolderError: the memory comes from a folder, and a file of it is damaged.
        """
        self._check_shape(queries)
        rows = slice(None) if is_open is None or bool(is_open.all()) else is_open.cpu()
        parts = [self._search(block.load(), queries, num_neighbors, rows) for block in self.blocks]
        return keep_best(parts, num_neighbors) if len(parts) > 1 else tuple(parts)

    def _check_shape(self, queries: Tensor) -> None:
        if (
            queries.dim() != 4
            or not queries.shape[1]
            or queries.shape[1] % self.num_heads
            or queries.shape[3] != self.head_dim
        ):
            raise StateError(
                f"queries are {tuple(queries.shape)}; this memory has {self.num_heads} heads and "
                f"keys of {self.head_dim}, so they must be (rows, {self.num_heads} or a multiple, "
                f"queries, {self.head_dim})"
            )

    def _search(
        self, block: LoadedBlock, queries: Tensor, num_neighbors: int, rows: Tensor | slice
    ) -> Retrieved:
        keys = block.keys
        asked = queries.detach().to(keys.device, keys.dtype)
        check_queries(asked)
        k = min(num_neighbors, keys.shape[2])
        found = _new_neighbors((*queries.shape[:3], k), keys)
        asked = asked[rows]
        if asked.numel():
            # All rows' queries, and those of all heads that share entries, are one head's queries.
            by_head = asked.unflatten(1, (self.num_heads, -1)).transpose(0, 1)
            result = block.index.search(by_head.flatten(1, 3).unsqueeze(0), block.stored_keys, k)
            for mine, theirs in (
                (found.slots, result.slots),
                (found.scores, result.scores),
                (found.valid, result.valid),
            ):
                by_row = theirs.view(*by_head.shape[:4], k).transpose(0, 1)
                mine[rows] = by_row.flatten(1, 2)
        heads = torch.arange(self.num_heads, device=keys.device) * keys.shape[2]
        first = heads.repeat_interleave(queries.shape[1] // self.num_heads).view(1, -1, 1, 1)
        lines = found.slots + first
        return Retrieved(
            found,
            keys.view(-1, self.head_dim),
            block.values.view(-1, self.head_dim),
            lines,
            lines,
            self._num_changes,
            self._num_changes,
        )


def select_heads(entries: Tensor, heads: Sequence[int] | None) -> Tensor:
    """Entries (H, n, D) of some heads, ascending, None is all; a view where they are neighbors."""
    if heads is None or len(heads) == entries.shape[0]:
        return entries
    first, last = heads[0], heads[-1]
    if last - first + 1 == len(heads):
        return entries[first : last + 1]
    return entries[list(heads)]


def _new_neighbors(shape: tuple[int, ...], keys: Tensor) -> Neighbors:
    """Neighbors of queries that found nothing."""
    return Neighbors(
        torch.zeros(shape, dtype=torch.int64, device=keys.device),
        torch.full(shape, -torch.inf, dtype=keys.dtype, device=keys.device),
        torch.zeros(shape, dtype=torch.bool, device=keys.device),
    )
