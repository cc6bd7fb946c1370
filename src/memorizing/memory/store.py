"""The memory of one layer: a ring of (key, value) entries per row, shared by all heads' clocks.

What is counted on the CPU goes to a GPU without waiting for what that still has to compute: CUDA
copies ordinary memory aside before the call returns, so that it may be changed afterwards.

Shapes: B rows, H heads, T queries, D head_dim, k neighbors.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from memorizing.errors import ConfigError, StateError
from memorizing.index_settings import ExactSettings, IndexSettings
from memorizing.knn import Neighbors, StoredKeys, make_index
from memorizing.knn.index import merge_candidates
from memorizing.memory.retrieved import Retrieved
from memorizing.memory.tokens import check_tokens, make_tokens, take_tokens, write_tokens


class Memory:
    """A ring of `capacity` slots per row (paper, section 3.1: "non-differentiable memory", FIFO).

    Entry e of a row (counted from the start of its document) is stored in slot e % capacity, in
    every head, for keys, values and tokens alike: a slot id means the same everywhere, and the
    number of entries appended so far is the whole clock of a row. Appending costs O(segment) at any
    capacity.

    `append`, `reset` and `load_state_dict` change rows of the memory in place, and count it in
    `num_changes` (B,); `seal` changes its index; nothing else changes anything.
    """

    def __init__(
        self,
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
        """Make an empty memory. The system gives its pages as they are first written.

        Args:
            num_rows: documents side by side.
            num_heads: heads, each with its own entries.
            capacity: entries that a row holds at most.
            head_dim: length of a key.
            dtype: of what is stored.
            device: of what is stored.
            index: what searches the keys; None is exact search.
            keep_tokens: also keep of which token each entry is, 4 bytes for all heads together.

        Raises:
            ConfigError: a capacity below 1.
            IndexUnavailableError: the index needs a package that is not installed.
        """
        if capacity < 1:
            raise ConfigError(
                f"the capacity of a memory is {capacity}; allowed: 1 or more; for no memory, give "
                "init_state a capacity of 0"
            )
        shape = (num_rows, num_heads, capacity, head_dim)
        # Tensors made in inference mode could not be written to outside of it.
        with torch.inference_mode(False):
            self.keys = torch.zeros(shape, dtype=dtype, device=device)
            self.values = torch.zeros(shape, dtype=dtype, device=device)
            self.tokens = make_tokens(num_rows, capacity, device) if keep_tokens else None
            self.num_appended = torch.zeros(num_rows, dtype=torch.int64)
            self.num_changes = torch.zeros(num_rows, dtype=torch.int64)
        self.index = make_index(ExactSettings() if index is None else index)

    @classmethod
    def from_tensors(
        cls,
        keys: Tensor,
        values: Tensor,
        num_appended: Tensor,
        index: IndexSettings,
        tokens: Tensor | None = None,
    ) -> Memory:
        """A memory of what its rows hold, (B, H, capacity, D), by reference.

        Args:
            keys: contiguous.
            values: contiguous.
            num_appended: (B,) int64: entries appended to each row so far.
            index: which is empty: the caller tells it of the entries.
            tokens: (B, capacity) int32, or none.
        """
        memory = cls.__new__(cls)
        with torch.inference_mode(False):
            memory.keys, memory.values, memory.num_appended = keys, values, num_appended
            memory.tokens = tokens
            memory.num_changes = torch.zeros_like(num_appended)
        memory.index = make_index(index)
        return memory

    @property
    def capacity(self) -> int:
        """Entries that a row holds at most."""
        return self.keys.shape[2]

    @property
    def num_rows(self) -> int:
        """Rows, each a document of its own."""
        return self.keys.shape[0]

    @property
    def size(self) -> Tensor:
        """(B,) int64 on the CPU: entries that each row holds now."""
        return self.num_appended.clamp(max=self.capacity)

    @property
    def stored_keys(self) -> StoredKeys:
        """The keys as an index sees them, by reference."""
        return StoredKeys(self.keys, tuple(self.num_appended.tolist()))

    def append(
        self,
        keys: Tensor,
        values: Tensor,
        valid: Tensor | None = None,
        tokens: Tensor | None = None,
    ) -> None:
        """Write entries after the newest; the oldest give way. In place.

        Args:
            keys: (B, H, n, D), any n, oldest first. Stored without gradient in the dtype of the
                memory.
            values: (B, H, n, D).
            valid: (B, n) bool: which of them are entries; None is all.
            tokens: (B, n) int, of which they are: where the memory keeps tokens, and only there.

        Raises:
            StateError: keys, values, mask or tokens of another shape.
        """
        rows, heads, _, dim = self.keys.shape
        num_new = keys.shape[2] if keys.dim() == 4 else 0
        if keys.shape != values.shape or keys.shape != (rows, heads, num_new, dim):
            raise StateError(
                f"cannot append keys {tuple(keys.shape)} and values {tuple(values.shape)} to a "
                f"memory of {tuple(self.keys.shape)}; both must be (rows, heads, n, head_dim)"
            )
        if valid is not None and valid.shape != (rows, num_new):
            raise StateError(
                f"cannot append {num_new} entries to {rows} rows by a mask of "
                f"{tuple(valid.shape)}; it must be (rows, n)"
            )
        check_tokens(tokens, self.tokens, num_new)
        keys, values = keys.detach(), values.detach()
        with torch.no_grad():
            if self.tokens is not None and tokens is not None:
                write_tokens(self.tokens, tokens, valid, self.num_appended)
            for row in range(self.num_rows):
                new_keys, new_values = keys[row], values[row]
                if valid is not None and not bool(valid[row].all()):
                    chosen = valid[row].nonzero().squeeze(-1).to(keys.device, non_blocking=True)
                    new_keys, new_values = new_keys[:, chosen], new_values[:, chosen]
                self._append_row(row, new_keys, new_values)
            self.index.append(self.stored_keys)

    def _append_row(self, row: int, keys: Tensor, values: Tensor) -> None:
        num_new = keys.shape[1]
        first = int(self.num_appended[row]) + max(0, num_new - self.capacity)
        keys, values = keys[:, -self.capacity :], values[:, -self.capacity :]
        start = first % self.capacity
        until_end = min(keys.shape[1], self.capacity - start)
        for ring, new in ((self.keys, keys), (self.values, values)):
            ring[row, :, start : start + until_end] = new[:, :until_end].to(ring.dtype)
            ring[row, :, : new.shape[1] - until_end] = new[:, until_end:].to(ring.dtype)
        self.num_appended[row] += num_new
        self.num_changes[row] += num_new > 0

    def reset(self, rows: Tensor) -> None:
        """Forget the entries of the rows where the mask `rows` (B,) is True. In place, O(1).

        Raises:
            StateError: not a mask over the rows.
        """
        rows = rows.cpu()
        if rows.dtype != torch.bool or rows.shape != self.num_appended.shape:
            raise StateError(
                f"the rows to reset are {tuple(rows.shape)} {rows.dtype}; give a bool per row: "
                f"({self.num_rows},)"
            )
        self.num_changes += rows & (self.num_appended > 0)
        self.num_appended[rows] = 0
        # What is missing is read from slot 0 and weighs 0, which does not hide infinite numbers.
        for ring in (self.keys, self.values):
            ring[rows.to(ring.device, non_blocking=True), :, 0] = 0
        self.index.reset(rows.nonzero().flatten().tolist())

    def set_index(self, index: IndexSettings) -> None:
        """Search with another index from now on, made from the keys. In place; may take minutes.

        Raises:
            IndexUnavailableError: it needs a package that is not installed; nothing is changed.
        """
        made = make_index(index)
        made.append(self.stored_keys)
        self.index = made

    def seal(self) -> None:
        """Prepare the index for a memory that is only read from now on. May take minutes."""
        self.index.seal(self.stored_keys)

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
        """Find the nearest entries of every query (B, H * G, T, D).

        Args:
            queries: compared with stored keys by inner product. With G above 1, every G heads that
                are neighbors share the entries of one head of the memory (grouped queries).
            num_neighbors: k.
            num_hidden: (B, T): how many of the newest entries a query must not see.
            donor_rows: (B,): the row whose memory is read in the place of the own one (a control).
            value_seed: give values of random entries in the place of those found (a control).
            is_open: (B,) bool: rows that read; the others find nothing. None is all.

        Raises:
            StateError: queries of other rows or heads, NaN or infinite.
        """
        num_rows, num_heads, _, head_dim = self.keys.shape
        num_groups = count_groups(queries, num_heads, head_dim, num_rows)
        rows = torch.arange(self.num_rows) if donor_rows is None else donor_rows.cpu()
        is_open = torch.ones_like(rows, dtype=torch.bool) if is_open is None else is_open.cpu()
        if num_hidden is not None:
            num_hidden = num_hidden.repeat(1, num_groups)
        found = self.index.search(
            # The queries of a group are further queries of the head that they share.
            queries.unflatten(1, (-1, num_groups)).flatten(2, 3),
            self.stored_keys,
            num_neighbors,
            num_hidden=num_hidden,
            key_rows=[
                row if reads else None
                for row, reads in zip(rows.tolist(), is_open.tolist(), strict=True)
            ],
        )
        shape = (*queries.shape[:3], num_neighbors)
        key_lines = value_lines = self._find_lines(found.slots, rows).view(shape)
        slots = found.slots
        if value_seed is not None:
            generator = torch.Generator().manual_seed(value_seed)
            random = torch.rand(found.slots.shape, generator=generator)
            slots = (random * self.size[rows].view(-1, 1, 1, 1)).long().to(found.slots.device)
            value_lines = self._find_lines(slots, rows).view(shape)
        neighbors = (part.view(shape) for part in (found.slots, found.scores, found.valid))
        tokens = None if self.tokens is None else take_tokens(self.tokens, slots, rows).view(shape)
        return self._refer(Neighbors(*neighbors), key_lines, value_lines, tokens)

    def retrieve_among(self, queries: Tensor, entries: Tensor, num_neighbors: int) -> Retrieved:
        """As `retrieve`, of a memory of one row, and among entries that are given.

        Args:
            queries: (1, H, T, D), finite.
            entries: (H, T, C) int64, each at most once for a query, -1 for none.
            num_neighbors: k.
        """
        best, scores = merge_candidates(queries[0], self.stored_keys, 0, entries, num_neighbors)
        valid = best >= 0
        slots = (best % self.capacity).masked_fill_(~valid, 0)
        found = Neighbors(
            *(part.unsqueeze(0) for part in (slots, scores.to(self.keys.dtype), valid))
        )
        lines = self._find_lines(found.slots, torch.zeros(1, dtype=torch.int64))
        return self._refer(found, lines, lines)

    def _refer(
        self,
        found: Neighbors,
        key_lines: Tensor,
        value_lines: Tensor,
        tokens: Tensor | None = None,
    ) -> Retrieved:
        return Retrieved(
            found,
            self.keys.view(-1, self.keys.shape[3]),
            self.values.view(-1, self.values.shape[3]),
            key_lines,
            value_lines,
            self.num_changes,
            self.num_changes.clone(),
            tokens,
        )

    def _find_lines(self, slots: Tensor, rows: Tensor) -> Tensor:
        """Lines of the entries in slots (B, H, T, k), if all rows and heads stood below another."""
        num_heads, capacity = self.keys.shape[1:3]
        first = (rows.view(-1, 1) * num_heads + torch.arange(num_heads)) * capacity
        first = first.to(slots.device, non_blocking=True)
        return slots + first.view(slots.shape[0], num_heads, 1, 1)

    def compute_positions(self, slots: Tensor, rows: Tensor | None = None) -> Tensor:
        """Position in its document of the entry of every slot (B, H, T, k); `rows` are donors."""
        return compute_positions(slots, self.num_appended, self.capacity, rows)

    def select_rows(self, rows: Tensor) -> Memory:
        """A memory of these rows only, as a copy. `rows` is an index tensor."""
        with torch.inference_mode(False):
            keys, values = self.keys[rows], self.values[rows]
            num_appended = self.num_appended[rows.cpu()]
            tokens = None if self.tokens is None else self.tokens[rows]
        chosen = Memory.from_tensors(keys, values, num_appended, self.index.settings, tokens)
        chosen.index.append(chosen.stored_keys)
        return chosen

    def __getstate__(self) -> dict[str, Any]:
        """For copies and pickles, without the index: it is made anew from the keys."""
        return self.__dict__ | {"index": self.index.settings}

    def __setstate__(self, values: dict[str, Any]) -> None:
        """Take over what `__getstate__` gave, and make the index. May take minutes."""
        self.__dict__.update(values)
        self.index = make_index(values["index"])
        self.index.append(self.stored_keys)

    def state_dict(self) -> dict[str, Tensor]:
        """Everything that is stored, by reference."""
        stored = {"keys": self.keys, "values": self.values, "num_appended": self.num_appended}
        return stored if self.tokens is None else stored | {"tokens": self.tokens}

    def load_state_dict(self, tensors: dict[str, Tensor]) -> None:
        """Copy what `state_dict` gave into this memory of the same shape. In place.

        Raises:
            StateError: tensors of another shape or dtype; nothing is changed then.
        """
        self.check_state_dict(tensors)
        for name, mine in self.state_dict().items():
            mine.copy_(tensors[name])
        self.num_changes += 1
        self.index.reset(range(self.num_rows))
        self.index.append(self.stored_keys)

    def check_state_dict(self, tensors: dict[str, Tensor]) -> None:
        """Refuse tensors that `load_state_dict` could not copy.

        Raises:
            StateError: tensors of another shape or dtype.
        """
        for name, mine in self.state_dict().items():
            if tensors[name].shape != mine.shape or tensors[name].dtype != mine.dtype:
                raise StateError(
                    f"memory {name} is {tuple(tensors[name].shape)} {tensors[name].dtype}, "
                    f"expected {tuple(mine.shape)} "
                    f"{mine.dtype}; use the capacity, rows and model it was saved with"
                )


def count_groups(queries: Tensor, num_heads: int, head_dim: int, num_rows: int | None) -> int:
    """G, the heads of queries (B, H * G, T, D) per head of a memory; of any B where that is None.

    Raises:
        StateError: queries of another shape.
    """
    rows = queries.shape[0] if num_rows is None and queries.dim() == 4 else num_rows
    if (
        queries.dim() != 4
        or queries.shape[0] != rows
        or not queries.shape[1]
        or queries.shape[1] % num_heads
        or queries.shape[3] != head_dim
    ):
        raise StateError(
            f"queries are {tuple(queries.shape)}; this memory has {num_heads} heads and keys of "
            f"{head_dim}, so they must be ({'rows' if rows is None else rows}, {num_heads} or a "
            f"multiple, queries, {head_dim})"
        )
    return queries.shape[1] // num_heads


def compute_positions(
    slots: Tensor, num_appended: Tensor, capacity: int, rows: Tensor | None = None
) -> Tensor:
    """Position in its document of the entry of every slot (B, H, T, k) of a ring; int64.

    Args:
        slots: of the ring.
        num_appended: (R,) on the CPU, entries that each row was given.
        capacity: slots of a row.
        rows: (B,), the rows that the slots are of; None is all, in their order.
    """
    appended = num_appended if rows is None else num_appended[rows.cpu()]
    newest = (appended - 1).to(slots.device, non_blocking=True).view(-1, 1, 1, 1)
    return newest - (newest - slots) % capacity
