"""Sealed blocks: another library's index over an append-only ring that drops its oldest entries.

No library has to delete: a block holds `block_len` consecutive entries of a row and never changes.
It is built when they are there, and dropped whole when the ring overwrites the first of them. A
block begins at a multiple of `block_len` and is the same whenever it is built, so that a memory
that was loaded or copied is searched as before. Sealing makes one block of all entries, which lasts
until half of it is overwritten; up to then, those are not asked for. Living entries that are in no
block (the newest, and the oldest) are searched exactly, so that everything is found and nothing
that was overwritten is.

Blocks index keys less their mean: all inner products with a query become smaller by the same
number, so that they are ordered alike, and what all keys share (in existing models most of their
length) leads no graph and no cell astray.

Shapes: B rows, H heads, T queries, N slots, D head_dim, C candidates, k neighbors.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from memorizing.errors import StateError
from memorizing.index_settings import SealedSettings
from memorizing.knn.blocks import BlockLibrary, KeyBlock, QuerySample
from memorizing.knn.index import KeyIndex, StoredKeys, check_queries, merge_candidates, search_heads
from memorizing.knn.sealed_files import (
    SavedBlock,
    copy_keys,
    hash_keys,
    read_blocks,
    write_blocks,
)


@dataclass(frozen=True)
class SealedBlock:
    """Consecutive entries of a row, indexed for every head."""

    entries: range
    """Counted from the start of the row's document."""
    heads: tuple[KeyBlock, ...]
    means: np.ndarray
    """(H, D) fp32: of the keys, which the index was built without."""
    keys_hash: str
    """Of the stored keys it was built from."""

    def is_kept(self, living: range, block_len: int) -> bool:
        """Whether it still serves, of the living entries of its row."""
        is_long = len(self.entries) > block_len
        num_allowed = len(self.entries) // 2 if is_long else 0
        return living.start - self.entries.start <= num_allowed


class SealedIndex(KeyIndex):
    """Blocks of one library, and exact search of the rest.

    Queries are rounded to the dtype of the keys, as in exact search. The candidates of all blocks
    and of the exact rest are scored again in fp32 with the stored keys. A query for which an
    approximate library finds fewer entries than there are (a cell with too few keys) is searched
    exactly.

    `append` builds every block that is due: its cost is amortized over `block_len` entries, and
    the call that builds takes as long as the library needs for them.
    """

    settings: SealedSettings

    def __init__(self, settings: SealedSettings, library: BlockLibrary) -> None:
        """Make an empty index of blocks that `library` builds."""
        super().__init__(settings)
        self._library = library
        self._blocks: dict[int, list[SealedBlock]] = {}
        self._sealed_until: dict[int, int] = {}
        self._queries = QuerySample()

    def append(self, stored: StoredKeys) -> None:
        """As `KeyIndex.append`.

        Raises:
            StateError: a key that is NaN or infinite is due to be put into a block.
        """
        # All rows first: the build of a block may be refused.
        for row, living in enumerate(stored.living):
            self._blocks[row] = [
                block
                for block in self._blocks.get(row, [])
                if block.is_kept(living, self.settings.block_len)
            ]
        for row, living in enumerate(stored.living):
            blocks = self._blocks[row]
            plan = plan_blocks(
                living,
                [block.entries for block in blocks],
                self._sealed_until.get(row, 0),
                self.settings.block_len,
            )
            for entries in plan:
                blocks.append(self._make_block(stored, row, entries))
                blocks.sort(key=lambda block: block.entries.start)
                self._sealed_until[row] = max(self._sealed_until.get(row, 0), entries.stop)

    def reset(self, rows: Sequence[int]) -> None:
        """As `KeyIndex.reset`."""
        for row in rows:
            self._blocks.pop(row, None)
            self._sealed_until.pop(row, None)

    def seal(self, stored: StoredKeys) -> None:
        """Make one block of all living entries of each row, in the place of the smaller ones.

        Appending to a full memory afterwards overwrites that block little by little. When half of
        it is gone it is dropped; its other entries are searched exactly until they are overwritten
        or in new blocks, of which every call of `append` builds one.

        Raises:
            StateError: a key is NaN or infinite.
        """
        for row, living in enumerate(stored.living):
            blocks = self._blocks.get(row, [])
            if not living or [block.entries for block in blocks] == [living]:
                continue
            self._blocks[row] = [self._make_block(stored, row, living)]
            self._sealed_until[row] = living.stop

    def observe_queries(self, queries: Tensor) -> None:
        """Keep a random sample of 4,096 queries per head, from which blocks built later learn.

        Queries are distributed differently from keys. Blocks that are built before any were
        observed know the keys alone. The sample belongs to the model, not to a row: `reset` keeps
        it. It is not saved; saved blocks keep what they learned. Changes the index in place.

        Args:
            queries: (B, H, T, D), finite.

        Raises:
            StateError: this index is not trained on queries, or they are NaN or infinite, or have
                other heads or another length than before.
        """
        if not self._library.trains_on_queries:
            raise StateError(
                f"the index {self.settings} is not trained on queries, so it would ignore them; "
                "use faiss_ivf:train_on_queries=true, or do not call observe_queries"
            )
        check_queries(queries)
        self._queries.add(queries)

    def save(self, folder: Path, stored: StoredKeys) -> None:
        """As `KeyIndex.save`: what takes longer to build than to read, as plain arrays.

        Blocks that are overwritten in part are left out: their keys are gone. The folder is whole
        or as it was before.

        Raises:
            ResourceError: a file cannot be written.
        """
        blocks = [
            SavedBlock(row, block.entries, block.keys_hash, [head.dump() for head in block.heads])
            for row, blocks in self._blocks.items()
            for block in blocks
            if block.entries.start >= stored.living[row].start
        ]
        write_blocks(folder, str(self.settings), blocks)

    def load(self, folder: Path, stored: StoredKeys) -> None:
        """As `KeyIndex.load`; nothing in the folder is trusted: no file can hold code.

        Blocks of libraries whose settings say that they are not saved are built from the keys.
        """
        blocks: dict[int, list[SealedBlock]] = {}
        for saved in read_blocks(folder, str(self.settings), stored):
            arrays = saved.heads if self.settings.is_saved else None
            block = self._make_block(stored, saved.row, saved.entries, arrays)
            blocks.setdefault(saved.row, []).append(block)
        self._blocks = blocks
        self._sealed_until = {row: done[-1].entries.stop for row, done in blocks.items()}

    def _make_block(
        self,
        stored: StoredKeys,
        row: int,
        entries: range,
        arrays: Sequence[Mapping[str, np.ndarray]] | None = None,
    ) -> SealedBlock:
        """A block of these entries, built or, with the arrays of every head, made again."""
        num_heads = stored.keys.shape[1]
        means = np.empty((num_heads, stored.keys.shape[3]), np.float32)

        def make(head: int) -> KeyBlock:
            keys = copy_keys(stored, row, head, entries).to(torch.float32, copy=True).numpy()
            if not np.isfinite(keys).all():
                wrong = entries[int(np.nonzero(~np.isfinite(keys).all(1))[0][0])]
                raise StateError(
                    f"the key of entry {wrong} of row {row}, head {head} is NaN or infinite; only "
                    "finite keys can be indexed: look for NaN in the weights or the input, and "
                    "reset the row (start_documents), whose entries are written but not sealed"
                )
            means[head] = keys.mean(0)
            keys -= means[head]
            if arrays is not None:
                return self._library.restore(arrays[head], keys)
            return self._library.build(keys, self._queries.get(head))

        heads = tuple(_get_threads().map(make, range(num_heads)))
        return SealedBlock(entries, heads, means, hash_keys(stored, row, entries))

    def propose(
        self, queries: Tensor, stored: StoredKeys, num_neighbors: int
    ) -> tuple[Tensor, Tensor] | None:
        """As `KeyIndex.propose`; None where entries are in no block."""
        living, blocks = stored.living[0], self._blocks.get(0, [])
        if list_stretches(living, [block.entries for block in blocks], stored.capacity):
            return None
        until = torch.full((queries.shape[1],), living.stop)
        return self._search_blocks(queries, blocks, num_neighbors, living.start, until)

    def _search_row(
        self, queries: Tensor, stored: StoredKeys, row: int, k: int, num_hidden: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        blocks, living = self._blocks.get(row, []), stored.living[row]
        if not blocks:
            keys = stored.keys[row, :, : len(living)]
            return search_heads(queries, keys, k, stored.newest_slots[row], num_hidden)
        if num_hidden is None:
            num_hidden = torch.zeros(queries.shape[1], dtype=torch.int64)
        visible_until = living.stop - num_hidden
        found, _ = self._search_blocks(queries, blocks, k, living.start, visible_until)
        outside = list_stretches(living, [block.entries for block in blocks], stored.capacity)
        best, scores = _search_stretches(
            queries, stored, row, outside, k, visible_until, found.to(queries.device)
        )
        wanted = (visible_until - living.start).clamp(0, k)
        (lacking,) = ((best >= 0).sum(-1).cpu() < wanted).any(0).nonzero(as_tuple=True)
        if len(lacking):
            places, every = lacking.to(queries.device), list_stretches(living, [], stored.capacity)
            best[:, places], scores[:, places] = _search_stretches(
                queries[:, places], stored, row, every, k, visible_until[lacking]
            )
        return scores, best % stored.capacity

    def _search_blocks(
        self,
        queries: Tensor,
        blocks: Sequence[SealedBlock],
        k: int,
        oldest: int,
        visible_until: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """Candidates of all blocks on the CPU, (H, T, C): entries, -1 for none, and their scores.

        At most `oversample` times k of a query, by the scores of the blocks.
        """
        num_wanted = self.settings.oversample * k
        asked = queries.float().cpu().contiguous().numpy()
        # Libraries share the queries of a head among threads; with few, heads go side by side.
        run = _get_threads().map if queries.shape[1] < torch.get_num_threads() else map
        entries, scores = [], []
        for block in blocks:
            first, until = block.entries.start, visible_until.clamp(max=block.entries.stop)
            wanted = range(max(0, oldest - first), int(until.max()) - first)
            if not wanted:
                continue
            # As many more as may turn out to be hidden from a query.
            num_asked = num_wanted + int((until.max() - until.clamp(min=first)).max())
            num_candidates = min(num_asked, len(wanted))

            def search(
                head: KeyBlock, of: np.ndarray, mean: np.ndarray, wanted=wanted, n=num_candidates
            ) -> tuple[np.ndarray, np.ndarray]:
                numbers, values = head.search(of, n, wanted)
                return numbers, values + (of @ mean)[:, None]

            found = run(search, block.heads, asked, block.means)
            numbers, values = (
                torch.from_numpy(np.stack(part)) for part in zip(*found, strict=True)
            )
            entry = numbers + first
            wrong = (numbers < 0) | (entry >= visible_until.unsqueeze(-1)) | (entry < oldest)
            entries.append(entry.masked_fill_(wrong, -1))
            scores.append(values.masked_fill_(wrong, -torch.inf))
        if not entries:
            nothing = torch.empty((*queries.shape[:2], 0))
            return nothing.long(), nothing
        candidates, values = torch.cat(entries, -1), torch.cat(scores, -1)
        if candidates.shape[-1] <= num_wanted:
            return candidates, values
        best, kept = values.topk(num_wanted, dim=-1, sorted=False)
        return candidates.gather(-1, kept), best


def _search_stretches(
    queries: Tensor,
    stored: StoredKeys,
    row: int,
    stretches: Sequence[range],
    k: int,
    visible_until: Tensor,
    *candidates: Tensor,
) -> tuple[Tensor, Tensor]:
    """The best of candidates and of stretches of consecutive slots; as `merge_candidates`."""
    parts = list(candidates)
    for entries in stretches:
        first = entries.start % stored.capacity
        keys = stored.keys[row, :, first : first + len(entries)]
        num_hidden = (entries.stop - visible_until).clamp(0, len(entries))
        hidden = num_hidden if bool(num_hidden.any()) else None
        scores, slots = search_heads(queries, keys, min(k, len(entries)), len(entries) - 1, hidden)
        # A key that is NaN is none.
        parts.append((slots + entries.start).masked_fill(~(scores > -torch.inf), -1))
    return merge_candidates(queries, stored, row, torch.cat(parts, -1), k)


def plan_blocks(
    living: range, sealed: Sequence[range], sealed_until: int, block_len: int
) -> list[range]:
    """Which entries are due to be sealed, in blocks that begin at multiples of `block_len`.

    All whole blocks of the entries that came after the last block; and of older entries that lost
    their block (only one longer than `block_len` leaves that many) the newest whole block, so that
    one call does not have to build a large memory again.

    Args:
        living: entries that are there.
        sealed: those of the blocks.
        sealed_until: the entry after the newest that was ever sealed.
        block_len: entries of a block.
    """
    first = -(-living.start // block_len) * block_len
    free = [
        range(start, start + block_len)
        for start in range(first, living.stop - block_len + 1, block_len)
        if all(start + block_len <= one.start or one.stop <= start for one in sealed)
    ]
    older = [block for block in free if block.start < sealed_until]
    return [*free[len(older) :], *older[-1:]]


def list_stretches(living: range, sealed: Sequence[range], capacity: int) -> list[range]:
    """Living entries outside the blocks, as ranges of entries in consecutive slots.

    Entry e of a row lies in slot e % capacity.
    """
    stretches = []
    start = living.start
    for block in [*sealed, range(living.stop, living.stop)]:
        wrap = start - start % capacity + capacity
        for stretch in (range(start, min(block.start, wrap)), range(wrap, block.start)):
            if stretch:
                stretches.append(stretch)
        start = block.stop
    return stretches


def _get_threads() -> ThreadPoolExecutor:
    """Threads of this process, as many as torch has."""
    return _make_threads(os.getpid(), torch.get_num_threads())


@cache
def _make_threads(process: int, num_threads: int) -> ThreadPoolExecutor:
    """Threads that a process made: those of another do not live on in its fork."""
    return ThreadPoolExecutor(num_threads, f"memorizing-search-{process}")
