"""Sealed blocks: another library's index over an append-only ring that drops its oldest entries.

No library has to delete: a block holds `block_len` consecutive entries of a row and never changes.
It is built when as many are waiting, and dropped whole when the ring has overwritten half of it; up
to then, what it finds of the overwritten entries is left out. Living entries that are in no block
(the newest, and what is left of a dropped block) are searched exactly, so that everything is found
and nothing that was overwritten is.

Shapes: B rows, H heads, T queries, N slots, D head_dim, C candidates, k neighbors.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from memorizing.errors import StateError
from memorizing.index_settings import SealedSettings
from memorizing.knn.blocks import BlockLibrary, KeyBlock
from memorizing.knn.exact import merge_candidates, search_exact
from memorizing.knn.index import KeyIndex, Neighbors, StoredKeys, check_queries
from memorizing.knn.query_sample import QuerySample
from memorizing.knn.sealed_files import (
    SavedBlock,
    copy_keys,
    hash_keys,
    read_blocks,
    write_blocks,
)
from memorizing.knn.sealed_plan import list_living, list_stretches, plan_blocks


@dataclass(frozen=True)
class SealedBlock:
    """Consecutive entries of a row, indexed for every head."""

    entries: range
    """Counted from the start of the row's document."""
    heads: tuple[KeyBlock, ...]
    keys_hash: str
    """Of the stored keys it was built from."""


class SealedIndex(KeyIndex):
    """Blocks of one library, and exact search of the rest.

    Queries are rounded to the dtype of the keys, as in exact search. The candidates of all blocks
    and of the exact rest are scored again in fp32 with the stored keys. A query for which an
    approximate library finds fewer entries than there are (a cell with too few keys) is searched
    exactly.

    `append` builds every block that is due: its cost is amortized over `block_len` entries, and
    the call that builds takes as long as the library needs for them.
    """

    def __init__(self, settings: SealedSettings, library: BlockLibrary) -> None:
        """Make an empty index of blocks that `library` builds."""
        super().__init__(settings)
        self._options = settings
        self._library = library
        self._blocks: dict[int, list[SealedBlock]] = {}
        self._sealed_until: dict[int, int] = {}
        self._oldest: dict[int, int] = {}
        self._queries = QuerySample()
        self._threads = ThreadPoolExecutor(torch.get_num_threads(), "memorizing-search")

    def append(self, stored: StoredKeys) -> None:
        """As `KeyIndex.append`.

        Raises:
            StateError: a key that is NaN or infinite is due to be put into a block.
        """
        all_living = list_living(stored)
        # All rows first: the build of a block may be refused.
        for row, living in enumerate(all_living):
            self._oldest[row] = living.start
            self._blocks[row] = [
                block
                for block in self._blocks.get(row, [])
                if living.start - block.entries.start <= len(block.entries) // 2
            ]
        for row, living in enumerate(all_living):
            blocks = self._blocks[row]
            plan = plan_blocks(
                living,
                [block.entries for block in blocks],
                self._sealed_until.get(row, 0),
                self._options.block_len,
            )
            for entries in plan:
                blocks.append(self._build(stored, row, entries))
                blocks.sort(key=lambda block: block.entries.start)
                self._sealed_until[row] = max(self._sealed_until.get(row, 0), entries.stop)

    def reset(self, rows: Sequence[int]) -> None:
        """As `KeyIndex.reset`."""
        for row in rows:
            self._blocks.pop(row, None)
            self._sealed_until.pop(row, None)
            self._oldest.pop(row, None)

    def seal(self, stored: StoredKeys) -> None:
        """Make one block of all living entries of each row, in the place of the smaller ones.

        Appending to a full memory afterwards overwrites that block little by little. When half of
        it is gone it is dropped; its other entries are searched exactly until they are overwritten
        or in new blocks, of which every call of `append` builds one.

        Raises:
            StateError: a key is NaN or infinite.
        """
        for row, living in enumerate(list_living(stored)):
            blocks = self._blocks.get(row, [])
            if not living or [block.entries for block in blocks] == [living]:
                continue
            self._oldest[row] = living.start
            self._blocks[row] = [self._build(stored, row, living)]
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

    def search(
        self,
        queries: Tensor,
        stored: StoredKeys,
        num_neighbors: int,
        *,
        num_hidden: Tensor | None = None,
        key_rows: Sequence[int | None] | None = None,
    ) -> Neighbors:
        """As `KeyIndex.search`."""
        queries = queries.detach().to(stored.keys.dtype)
        check_queries(queries)
        sources = range(queries.shape[0]) if key_rows is None else key_rows
        in_blocks = [source is not None and bool(self._blocks.get(source)) for source in sources]
        found = search_exact(
            queries,
            stored.keys,
            stored.sizes,
            num_neighbors,
            newest_slots=stored.newest_slots,
            num_hidden=num_hidden,
            key_rows=[
                None if blocks else source
                for source, blocks in zip(sources, in_blocks, strict=True)
            ],
        )
        if queries.shape[2] == 0 or not any(in_blocks):
            return found
        for row, source in enumerate(sources):
            if source is None or not in_blocks[row]:
                continue
            hidden = torch.zeros(queries.shape[2], dtype=torch.int64)
            if num_hidden is not None:
                hidden = num_hidden[row].detach().cpu()
            entries, scores = self._search_row(queries[row], stored, source, num_neighbors, hidden)
            found.scores[row] = scores
            found.slots[row] = (entries % stored.capacity).masked_fill(entries < 0, 0)
            found.valid[row] = entries >= 0
        return found

    def save(self, folder: Path) -> None:
        """As `KeyIndex.save`: the blocks that take longer to build than to read.

        Blocks that are overwritten in part are left out: their keys are gone.

        Every file is whole or not there; the manifest is replaced last, so that what was saved in
        the folder before stays readable until then.

        Raises:
            ResourceError: a file cannot be written.
        """
        blocks = (
            SavedBlock(row, block.entries, block.keys_hash, self._dump(block))
            for row, blocks in self._blocks.items()
            for block in blocks
            if block.entries.start >= self._oldest[row]
        )
        write_blocks(folder, str(self.settings), blocks)

    def load(self, folder: Path, stored: StoredKeys) -> None:
        """As `KeyIndex.load`; manifest, keys and checksums are compared before a file is used.

        Flat blocks are built again from the keys: that copies them, as reading would, and a file
        of them would take as much space as the keys.
        """
        blocks: dict[int, list[SealedBlock]] = {}
        has_files = self._library.is_saved
        for saved in read_blocks(folder, str(self.settings), stored, has_files=has_files):
            if has_files:
                dim = stored.keys.shape[3]
                heads = tuple(
                    self._library.restore(files, len(saved.entries), dim) for files in saved.heads
                )
                block = SealedBlock(saved.entries, heads, saved.keys_hash)
            else:
                block = self._build(stored, saved.row, saved.entries)
            blocks.setdefault(saved.row, []).append(block)
        self._blocks = blocks
        self._oldest = {row: living.start for row, living in enumerate(list_living(stored))}
        self._sealed_until = {row: done[-1].entries.stop for row, done in blocks.items()}

    def _dump(self, block: SealedBlock) -> Iterator[dict[str, bytes]]:
        return (head.dump() for head in block.heads if self._library.is_saved)

    def _build(self, stored: StoredKeys, row: int, entries: range) -> SealedBlock:
        heads = []
        for head in range(stored.keys.shape[1]):
            keys = copy_keys(stored, row, head, entries).float().numpy()
            if not np.isfinite(keys).all():
                wrong = entries[int(np.nonzero(~np.isfinite(keys).all(1))[0][0])]
                raise StateError(
                    f"the key of entry {wrong} of row {row}, head {head} is NaN or infinite; only "
                    "finite keys can be indexed: look for NaN in the weights or the input, and "
                    "reset the row (start_documents), whose entries are written but not sealed"
                )
            heads.append(self._library.build(keys, self._queries.get(head)))
        return SealedBlock(entries, tuple(heads), hash_keys(stored, row, entries))

    def _search_row(
        self, queries: Tensor, stored: StoredKeys, source: int, k: int, num_hidden: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Entries and scores (H, T, k) for queries (H, T, D) in a row that has blocks."""
        living = list_living(stored)[source]
        visible_until = living.stop - num_hidden
        blocks = self._blocks[source]
        parts = [
            _search_stretch(queries, stored, source, entries, k, visible_until)
            for entries in list_stretches(
                living, [block.entries for block in blocks], stored.capacity
            )
        ]
        parts.append(
            self._search_blocks(queries, blocks, k, living.start, visible_until).to(queries.device)
        )
        found = merge_candidates(queries, stored, source, torch.cat(parts, -1), k)
        wanted = (visible_until - living.start).clamp(0, k)
        lacking = ((found[0] >= 0).sum(-1).cpu() < wanted).any(0).nonzero().flatten()
        if len(lacking):
            few = queries[:, lacking.to(queries.device)]
            until = visible_until[lacking]
            parts = [
                _search_stretch(few, stored, source, entries, k, until)
                for entries in list_stretches(living, [], stored.capacity)
            ]
            full = merge_candidates(few, stored, source, torch.cat(parts, -1), k)
            for mine, other in zip(found, full, strict=True):
                mine[:, lacking.to(mine.device)] = other
        return found

    def _search_blocks(
        self,
        queries: Tensor,
        blocks: Sequence[SealedBlock],
        k: int,
        oldest: int,
        visible_until: Tensor,
    ) -> Tensor:
        """Candidate entries (H, T, C) of all blocks on the CPU, -1 where there is none."""
        num_wanted = self._options.oversample * k
        asked_of = []
        for block in blocks:
            ends = visible_until[visible_until > block.entries.start]
            if len(ends):
                # As many more as may turn out to be hidden from a query, or overwritten.
                num_hidden = max(0, block.entries.stop - int(ends.min()))
                living = block.entries.stop - max(oldest, block.entries.start)
                num_asked = -(-num_wanted * len(block.entries) // living) + num_hidden
                asked_of.append((block, min(num_asked, len(block.entries))))
        if not asked_of:
            return torch.empty((*queries.shape[:2], 0), dtype=torch.int64)
        asked = queries.float().cpu().contiguous().numpy()
        # Libraries share the queries of a head among threads; with few, heads go side by side.
        run = self._threads.map if queries.shape[1] < torch.get_num_threads() else map
        entries, scores = [], []
        for block, num_candidates in asked_of:
            found = run(lambda head, of, n=num_candidates: head.search(of, n), block.heads, asked)
            numbers, values = (
                torch.from_numpy(np.stack(part)) for part in zip(*found, strict=True)
            )
            entry = numbers + block.entries.start
            wrong = (numbers < 0) | (entry >= visible_until.unsqueeze(-1)) | (entry < oldest)
            entries.append(entry.masked_fill_(wrong, -1))
            scores.append(values.masked_fill_(wrong, -torch.inf))
        candidates = torch.cat(entries, -1)
        if candidates.shape[-1] <= num_wanted:
            return candidates
        kept = torch.cat(scores, -1).topk(num_wanted, dim=-1, sorted=False).indices
        return candidates.gather(-1, kept)


def _search_stretch(
    queries: Tensor, stored: StoredKeys, source: int, entries: range, k: int, visible_until: Tensor
) -> Tensor:
    """The best entries (H, T, k) of a stretch of consecutive slots; -1 where there are fewer."""
    first = entries.start % stored.capacity
    keys = stored.keys[source : source + 1, :, first : first + len(entries)]
    num_hidden = (entries.stop - visible_until).clamp(0, len(entries))
    hidden = num_hidden.unsqueeze(0).to(keys.device) if bool(num_hidden.any()) else None
    found = search_exact(queries.unsqueeze(0), keys, [len(entries)], k, num_hidden=hidden)
    return (found.slots[0] + entries.start).masked_fill(~found.valid[0], -1)
