"""One memory over several ranks, which all read the same rows: each holds a part of the entries.

For a document whose memory is larger than a device. Entry e of a row, counted from the start of its
document, is kept by rank e % N, so that all hold as many; N rings of C / N slots hold what one ring
of C slots does. A look-up is a search of every rank among its own, and two exchanges: the scores of
all, of which each rank finds the best, and the keys and values of these, from the ranks that hold
them. Of B H T queries of k neighbors of width D, each rank receives

    8 (N - 1) B H T k  +  4 (N - 1) / N  B H T k D x bytes of a stored number

bytes: scores and numbers of entries, then keys and values, which are summed with zeros.

Shapes: B rows, H heads, T queries, D head_dim, k neighbors.
"""

from __future__ import annotations

from typing import final

import torch
from torch import Tensor

from memorizing.errors import ConfigError
from memorizing.index_settings import IndexSettings
from memorizing.knn import Neighbors
from memorizing.memory.retrieved import Retrieved
from memorizing.memory.store import Memory, compute_positions
from memorizing.memory.tokens import check_tokens, make_tokens, take_tokens, write_tokens
from memorizing.ranks import Ranks


@final
class SpreadMemory:
    """What a history and a model ask of a `Memory`, with the same results; in parts.

    All ranks call `append`, `reset`, `retrieve` and `select_rows` together, with equal arguments.
    """

    def __init__(
        self,
        ranks: Ranks,
        num_rows: int,
        num_heads: int,
        capacity: int,
        head_dim: int,
        dtype: torch.dtype = torch.bfloat16,
        device: torch.device | str | None = None,
        index: IndexSettings | None = None,
        *,
        keep_tokens: bool = False,
    ) -> None:
        """Make an empty memory; see `Memory`. Tokens are few bytes: every rank keeps all of them.

        Raises:
            ConfigError: a capacity that the ranks cannot divide.
            IndexUnavailableError: the index needs a package that is not installed.
        """
        if capacity % ranks.size:
            raise ConfigError(
                f"a memory of {capacity:,} entries is spread over {ranks.size} processes; its "
                "capacity must be a multiple of them"
            )
        part = capacity // ranks.size
        self._part = Memory(num_rows, num_heads, part, head_dim, dtype, device, index)
        self._ranks = ranks
        with torch.inference_mode(False):
            self.num_appended = torch.zeros(num_rows, dtype=torch.int64)
            self.num_changes = torch.zeros(num_rows, dtype=torch.int64)
            self._tokens = make_tokens(num_rows, capacity, device) if keep_tokens else None

    @property
    def capacity(self) -> int:
        """Entries that a row holds at most, in all ranks."""
        return self._part.capacity * self._ranks.size

    @property
    def size(self) -> Tensor:
        """(B,) int64 on the CPU: entries that each row holds now, in all ranks."""
        return self.num_appended.clamp(max=self.capacity)

    def append(
        self,
        keys: Tensor,
        values: Tensor,
        valid: Tensor | None = None,
        tokens: Tensor | None = None,
    ) -> None:
        """Write entries after the newest; the oldest give way. In place; see `Memory.append`."""
        check_tokens(tokens, self._tokens, keys.shape[2])
        if valid is None:
            valid = torch.ones(len(keys), keys.shape[2], dtype=torch.bool)
        entries = self.num_appended.unsqueeze(1) + valid.cumsum(1) - 1
        self._part.append(keys, values, valid & (entries % self._ranks.size == self._ranks.rank))
        if self._tokens is not None and tokens is not None:
            write_tokens(self._tokens, tokens, valid, self.num_appended)
        num_new = valid.sum(1)
        self.num_appended += num_new
        self.num_changes += num_new > 0

    def reset(self, rows: Tensor) -> None:
        """Forget the entries of the rows where the mask `rows` (B,) is True. In place."""
        rows = rows.cpu()
        self._part.reset(rows)
        self.num_changes += rows & (self.num_appended > 0)
        self.num_appended[rows] = 0

    def select_rows(self, rows: Tensor) -> SpreadMemory:
        """A memory of these rows only, as a copy. `rows` is an index tensor."""
        chosen = SpreadMemory.__new__(SpreadMemory)
        chosen._part, chosen._ranks = self._part.select_rows(rows), self._ranks
        with torch.inference_mode(False):
            chosen._tokens = None if self._tokens is None else self._tokens[rows]
            chosen.num_appended = self.num_appended[rows.cpu()]
            chosen.num_changes = torch.zeros_like(chosen.num_appended)
        return chosen

    def compute_positions(self, slots: Tensor, rows: Tensor | None = None) -> Tensor:
        """Position in its document of the entry of every slot (B, H, T, k); `rows` are donors."""
        return compute_positions(slots, self.num_appended, self.capacity, rows)

    def retrieve(
        self,
        queries: Tensor,
        num_neighbors: int,
        *,
        num_hidden: Tensor | None = None,
        donor_rows: Tensor | None = None,
        value_seed: int | None = None,
        is_open: Tensor | None = None,
    ) -> Retrieved:
        """Find the nearest entries of every query (B, H, T, D); see `Memory.retrieve`.

        What is found is a copy, the same in all ranks. Equal scores are ordered newest first.
        """
        rows = torch.arange(len(self.num_appended)) if donor_rows is None else donor_rows.cpu()
        if num_hidden is not None:
            appended = self.num_appended[rows].unsqueeze(1)
            first = (appended - num_hidden.cpu()).clamp(min=0)
            num_hidden = self._count_own(appended) - self._count_own(first)
        found = self._part.retrieve(
            queries, num_neighbors, num_hidden=num_hidden, donor_rows=donor_rows, is_open=is_open
        )
        entries, neighbors = self._merge(found.neighbors, rows, num_neighbors)
        keys = self._fetch(found.stored_keys, entries, rows)
        value_entries = entries
        if value_seed is not None:
            generator = torch.Generator().manual_seed(value_seed)
            random = torch.rand(entries.shape, generator=generator)
            slots = (random * self.size[rows].view(-1, 1, 1, 1)).long().to(entries.device)
            value_entries = self.compute_positions(slots, rows)
        values = self._fetch(found.stored_values, value_entries, rows)
        lines = torch.arange(entries.numel(), device=entries.device).view(entries.shape)
        tokens = None
        if self._tokens is not None:
            slots = value_entries.clamp(min=0) % self.capacity
            tokens = take_tokens(self._tokens, slots, rows)
        clock = self.num_changes, self.num_changes.clone()
        return Retrieved(neighbors, keys, values, lines, lines, *clock, tokens)

    def _count_own(self, end: Tensor) -> Tensor:
        """How many of the entries before `end` this rank was given."""
        size, rank = self._ranks.size, self._ranks.rank
        return (end - rank + size - 1) // size

    def _merge(self, mine: Neighbors, rows: Tensor, num_neighbors: int) -> tuple[Tensor, Neighbors]:
        """The best of what all ranks found: numbers of entries (B, H, T, k), and as `Neighbors`."""
        positions = self._part.compute_positions(mine.slots, rows)
        entries = (positions * self._ranks.size + self._ranks.rank).masked_fill(~mine.valid, -1)
        wide = torch.promote_types(mine.scores.dtype, torch.float32)
        entries, scores = (
            torch.cat(self._ranks.gather_all(part).unbind(), -1)
            for part in (entries.int(), mine.scores.to(wide))
        )
        # By age, then by score: of equal ones the newest stands first.
        entries, order = entries.sort(dim=-1, descending=True)
        scores, order = scores.gather(-1, order).sort(dim=-1, descending=True, stable=True)
        entries = entries.gather(-1, order)[..., :num_neighbors].long()
        valid = entries >= 0
        slots = (entries % self.capacity).masked_fill(~valid, 0)
        scores = scores[..., :num_neighbors].to(mine.scores.dtype)
        return entries, Neighbors(slots, scores, valid)

    def _fetch(self, stored: Tensor, entries: Tensor, rows: Tensor) -> Tensor:
        """Lines (B H T k, D) of entries (B, H, T, k), each from the rank that holds it; -1 is 0."""
        size, num_heads = self._ranks.size, entries.shape[1]
        slots = entries.clamp(min=0) // size % self._part.capacity
        first = rows.view(-1, 1) * num_heads + torch.arange(num_heads)
        lines = slots + (first * self._part.capacity).to(slots.device).view(-1, num_heads, 1, 1)
        is_mine = (entries >= 0) & (entries % size == self._ranks.rank)
        found = stored.index_select(0, lines.flatten())
        found = found.masked_fill_(~is_mine.view(-1, 1), 0)
        # As bytes: a sum with zeros, whatever the stored dtype.
        self._ranks.add_up(found.view(torch.uint8))
        return found
