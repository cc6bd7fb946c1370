"""A memory that is only read: entries in one or more blocks, the same for every row of a batch.

Shapes: B rows, H heads, G heads of queries per head of the memory, T queries, n entries of a block,
D head_dim, k neighbors.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from memorizing.errors import StateError
from memorizing.index_settings import ExactSettings, IndexSettings, SealedSettings
from memorizing.knn import Neighbors, make_index
from memorizing.knn.index import check_queries
from memorizing.memory.retrieved import Retrieved, count_columns, keep_best
from memorizing.memory.store import Memory, count_groups


class FrozenBlock:
    """Consecutive entries that are searched together, loaded at their first search."""

    def __init__(
        self,
        num_entries: int,
        load: Callable[[], Memory],
        check: Callable[[], object] | None = None,
    ) -> None:
        """Take what loads them, which is called once, and what checks them before each search."""
        self.num_entries = num_entries
        self._load = load
        self._check = check
        self._loaded: Memory | None = None
        self._lock = threading.Lock()

    def load(self) -> Memory:
        """The entries; those that were loaded by the first call."""
        if self._check is not None:
            self._check()
        # Tensors made in inference mode could not be used with gradients outside of it.
        with self._lock, torch.inference_mode(False):
            if self._loaded is None:
                self._loaded = self._load()
            return self._loaded


def make_block(
    keys: Tensor,
    values: Tensor,
    settings: IndexSettings,
    restore: Callable[[Memory], bool] | None = None,
) -> Memory:
    """A memory of one row with entries (1, H, n, D), and their index. May take minutes.

    With an index of another library, fewer entries than one of its blocks are searched exactly, as
    those that wait for a block in a memory that grows.

    Args:
        keys: what is searched, contiguous.
        values: what is found, contiguous.
        settings: of the index.
        restore: takes the index over from where it was saved, or says that there is none.
    """
    block = Memory.from_tensors(keys, values, torch.tensor([keys.shape[2]]), settings)
    if restore is not None and restore(block):
        return block
    if not isinstance(settings, SealedSettings):
        block.index.append(block.stored_keys)
    elif keys.shape[2] >= settings.block_len:
        block.seal()
    return block


class SearchedMemory(Protocol):
    """Entries of one layer that never change, wherever they are; see `FrozenMemory`."""

    num_heads: int

    @property
    def size(self) -> int:
        """Entries."""
        ...

    @property
    def first_entries(self) -> Sequence[int]:
        """Per part of what is retrieved, the number of the entry in its slot 0."""
        ...

    def search_exactly(self) -> SearchedMemory:
        """The same entries without their index."""
        ...

    def retrieve(self, queries: Tensor, num_neighbors: int) -> tuple[Retrieved, ...]:
        """Find the nearest entries of every query (B, H * G, T, D)."""
        ...


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
            lambda: make_block(
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

    def search_exactly(self) -> FrozenMemory:
        """The same entries without their index; nothing is copied."""

        def load(block: FrozenBlock) -> Memory:
            held = block.load()
            return make_block(held.keys, held.values, ExactSettings())

        blocks = [FrozenBlock(one.num_entries, partial(load, one)) for one in self.blocks]
        return FrozenMemory(self.num_heads, self.head_dim, blocks)

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
        count_groups(queries, self.num_heads, self.head_dim, None)
        rows = slice(None) if is_open is None or bool(is_open.all()) else is_open.cpu()
        blocks = [block.load() for block in self.blocks]
        if not blocks:
            return ()
        # Blocks of one memory are alike.
        queries = queries.detach().to(blocks[0].keys.device, blocks[0].keys.dtype)
        check_queries(queries)
        # The queries of all rows and of a group are those of a head of the one row of a block.
        by_head = queries[rows].transpose(0, 1).unflatten(0, (self.num_heads, -1))
        asked = by_head.flatten(1, 3).unsqueeze(0)
        is_asked = len(blocks) > 1 and asked.numel() > 0
        candidates = choose_candidates(blocks, asked, num_neighbors) if is_asked else None
        if candidates is None:
            found = [block.retrieve(asked, min(num_neighbors, block.capacity)) for block in blocks]
        else:
            found = [
                block.retrieve_among(asked, entries, min(num_neighbors, entries.shape[-1]))
                for block, entries in zip(blocks, candidates, strict=True)
            ]
        parts = [_place(one, queries.shape[:3], rows) for one in found]
        return keep_best(parts, num_neighbors) if len(parts) > 1 else tuple(parts)


def choose_candidates(
    blocks: Sequence[Memory], queries: Tensor, num_neighbors: int
) -> list[Tensor] | None:
    """Of what the indexes of all blocks propose, the best by their scores.

    What is scored exactly is read where it lies, in a mapped file a page for every entry: of many
    blocks only what may be among the nearest of all.

    Args:
        blocks: of one row.
        queries: (1, H, T, D) in their dtype, finite.
        num_neighbors: k.

    Returns:
        Entries (H, T, any number) per block, -1 for none. None where every block has to be
        searched by itself: not all of it is in an index, or some query is offered less than k.
    """
    proposed = []
    for block in blocks:
        found = block.index.propose(queries[0], block.stored_keys, num_neighbors)
        if found is None:
            return None
        proposed.append(found)
    widths = [scores.shape[-1] for _, scores in proposed]
    scores = torch.cat([scores for _, scores in proposed], -1)
    last = scores.topk(max(widths), dim=-1).values[..., -1:]
    kept = (scores >= last) & (scores > -torch.inf)
    if bool((kept.sum(-1) < min(num_neighbors, sum(block.capacity for block in blocks))).any()):
        return None
    used = kept.flatten(0, -2).any(0).split(widths)
    chosen = []
    for (entries, _), mask, columns in zip(proposed, kept.split(widths, -1), used, strict=True):
        width = count_columns(columns)
        entries = entries[..., :width].masked_fill(~mask[..., :width], -1)
        chosen.append(entries.to(queries.device))
    return chosen


def _place(found: Retrieved, shape: torch.Size, rows: Tensor | slice) -> Retrieved:
    """What the queries of some rows found, for all rows and heads (B, H * G, T); see `retrieve`."""
    num_asked = shape[0] if isinstance(rows, slice) else int(rows.sum())
    k = found.neighbors.slots.shape[-1]

    def place(part: Tensor, nothing: float) -> Tensor:
        by_row = part.view(shape[1], num_asked, shape[2], k).transpose(0, 1)
        if isinstance(rows, slice):
            return by_row.contiguous()
        whole = part.new_full((*shape, k), nothing)
        whole[rows] = by_row
        return whole

    neighbors = found.neighbors
    lines = place(found.key_lines, 0)
    return replace(
        found,
        neighbors=Neighbors(
            place(neighbors.slots, 0),
            place(neighbors.scores, -torch.inf),
            place(neighbors.valid, False),
        ),
        key_lines=lines,
        value_lines=lines,
    )


def select_heads(entries: Tensor, heads: Sequence[int] | None) -> Tensor:
    """Entries (H, n, D) of some heads, ascending, None is all; a view where they are neighbors."""
    if heads is None or len(heads) == entries.shape[0]:
        return entries
    first, last = heads[0], heads[-1]
    if last - first + 1 == len(heads):
        return entries[first : last + 1]
    return entries[list(heads)]
