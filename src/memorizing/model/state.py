"""The history of a model: everything that is not a weight is passed in and returned.

Shapes: B rows, H heads, C cached tokens, D head_dim.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from memorizing.devices import send
from memorizing.errors import StateError
from memorizing.memory import Memory

_STAGED_NAMES = ("keys", "values", "valid")


@dataclass(frozen=True)
class Entries:
    """Keys and values (B, H, n, D) of n tokens, without gradient."""

    keys: Tensor
    values: Tensor

    def select(self, rows: Tensor) -> Entries:
        """These rows only."""
        return Entries(self.keys[rows], self.values[rows])


@dataclass(frozen=True)
class Staged:
    """New entries of one memory layer that are not written yet."""

    entries: Entries
    valid: Tensor
    """(B, n) bool on the CPU."""

    def keep(self, rows: Tensor) -> Staged:
        """The entries of rows where the mask (B, 1) is True, less the columns that hold none."""
        valid = self.valid & rows
        columns = valid.any(0).nonzero().flatten()
        chosen = send(columns, self.entries.keys.device)
        entries = Entries(self.entries.keys[:, :, chosen], self.entries.values[:, :, chosen])
        return Staged(entries, valid[:, columns])


def _drop_empty(staged: dict[int, Staged]) -> dict[int, Staged]:
    return {layer: waiting for layer, waiting in staged.items() if waiting.valid.shape[1]}


@dataclass(frozen=True)
class RetrievalControl:
    """Makes retrieval wrong on purpose, to show what the right one is worth."""

    donor_rows: Tensor | None = None
    """(B,) int64: row b reads the memory of row donor_rows[b]."""
    shuffle_values: bool = False
    """Right keys, but the values of random other entries."""
    seed: int = 0


@dataclass(frozen=True)
class ModelState:
    """Where every row is in its document, and what the model keeps of what it read.

    A forward pass returns a new state and leaves its own as it was. The memories are the exception
    that makes them cheap: `commit` and `start_documents` change them in place, so a state from
    before is void after these calls, and refused.
    """

    segment_len: int
    position: Tensor
    """(B,) int64 on the CPU: tokens of its document that each row has read."""
    xl_caches: tuple[Entries, ...]
    """Per layer, the last tokens' keys and values, aligned on the right; how many count follows
    from `position`."""
    recent: tuple[Tensor, ...]
    """Per layer, the last tokens' raw keys, or queries and keys (B, H, P, D), where the model mixes
    them (`model/mixing.py`); else empty."""
    staged: dict[int, Staged]
    """Per memory layer, entries that wait for the end of their segment."""
    memories: dict[int, Memory]
    """Per memory layer, what was written."""

    @property
    def num_rows(self) -> int:
        """Rows of the batch."""
        return self.position.shape[0]

    def count_pending(self) -> Tensor:
        """(B,) int64 on the CPU: staged entries per row."""
        for staged in self.staged.values():
            return staged.valid.sum(1)
        return torch.zeros_like(self.position)

    def check_step(self, num_new: Tensor, *, may_wait: bool = False) -> None:
        """Refuse a call over a segment boundary, past unwritten entries, or from a void state.

        `may_wait`: entries of earlier segments may be unwritten.

        Raises:
            StateError: with the row, what it has and what to do.
        """
        pending = self.count_pending()
        self._check_memories(pending)
        offset = self.position % self.segment_len
        for row in range(self.num_rows):
            place, new = int(offset[row]), int(num_new[row])
            if place + new > self.segment_len:
                raise StateError(
                    f"row {row} is at position {int(self.position[row])} and {new} more tokens "
                    "would cross a boundary of "
                    f"segments of {self.segment_len}; split the call so that at most "
                    f"{self.segment_len - place} tokens follow"
                )
            if new and place == 0 and int(pending[row]) and not may_wait:
                raise StateError(
                    f"row {row} starts a segment with {int(pending[row])} entries of the last one "
                    "uncommitted; "
                    "call state = state.commit() after the backward pass of every segment"
                )

    def _check_memories(self, pending: Tensor) -> None:
        """Refuse a state whose memories went on without it: each token is written or staged once.

        Raises:
            StateError: with the row, where it stands and what to do.
        """
        for memory in self.memories.values():
            wrong = memory.num_appended + pending != self.position
            if bool(wrong.any()):
                row = int(wrong.nonzero()[0])
                raise StateError(
                    f"row {row} of this state has read {int(self.position[row])} tokens, but its "
                    f"memory has taken {int(memory.num_appended[row])} and "
                    f"{int(pending[row])} are staged: commit(), start_documents() or "
                    "load_state_dict() changed the memories since; go on from the state that the "
                    "last of them returned"
                )

    def commit(self) -> ModelState:
        """Write the staged entries of rows that stand at the end of a segment into their memories.

        Call it after the backward pass of a segment. Before the end of a segment it does nothing.
        Changes the memories in place.

        Raises:
            StateError: the entries are written already.
        """
        if not self.staged:
            return self
        at_boundary = (self.position % self.segment_len == 0) & (self.position > 0)
        if not bool(at_boundary.any()):
            return self
        self._check_memories(self.count_pending())
        staged = {}
        rows = at_boundary.unsqueeze(1)
        for layer, waiting in self.staged.items():
            self.memories[layer].append(
                waiting.entries.keys, waiting.entries.values, waiting.valid & rows
            )
            staged[layer] = waiting.keep(~rows)
        return replace(self, staged=_drop_empty(staged))

    def start_documents(self, doc_start: Tensor) -> ModelState:
        """Start a new document in the rows where the mask (B,) is True.

        Resets these rows of the memories in place. What these rows have staged is dropped.

        Raises:
            StateError: not a mask over the rows.
        """
        doc_start = doc_start.cpu()
        if doc_start.dtype != torch.bool or doc_start.shape != self.position.shape:
            raise StateError(
                f"doc_start is {tuple(doc_start.shape)} {doc_start.dtype}; it must be a bool per "
                f"row: ({self.num_rows},)"
            )
        if not bool(doc_start.any()):
            return self
        for memory in self.memories.values():
            memory.reset(doc_start)
        staged = {
            layer: waiting.keep(~doc_start.unsqueeze(1)) for layer, waiting in self.staged.items()
        }
        # What the caches hold needs no clearing: at position 0 none of it counts.
        position = self.position.masked_fill(doc_start, 0)
        return replace(self, position=position, staged=_drop_empty(staged))

    def select_rows(self, rows: Tensor) -> ModelState:
        """A state of these rows only (an index tensor), in that order, as a copy."""
        rows = rows.cpu()
        return replace(
            self,
            position=self.position[rows],
            xl_caches=tuple(cache.select(rows) for cache in self.xl_caches),
            recent=tuple(part[rows] for part in self.recent),
            staged={
                layer: Staged(waiting.entries.select(rows), waiting.valid[rows])
                for layer, waiting in self.staged.items()
            },
            memories={layer: memory.select_rows(rows) for layer, memory in self.memories.items()},
        )

    def state_dict(self) -> dict[str, Tensor]:
        """All tensors by name, by reference; every one has the rows as its first dimension."""
        tensors = {"position": self.position}
        for layer, cache in enumerate(self.xl_caches):
            tensors[f"xl_caches.{layer}.keys"] = cache.keys
            tensors[f"xl_caches.{layer}.values"] = cache.values
        for layer, part in enumerate(self.recent):
            tensors[f"recent.{layer}"] = part
        for layer, waiting in self.staged.items():
            tensors[f"staged.{layer}.keys"] = waiting.entries.keys
            tensors[f"staged.{layer}.values"] = waiting.entries.values
            tensors[f"staged.{layer}.valid"] = waiting.valid
        for layer, memory in self.memories.items():
            tensors |= {
                f"memories.{layer}.{name}": tensor for name, tensor in memory.state_dict().items()
            }
        return tensors

    def load_state_dict(self, tensors: dict[str, Tensor]) -> ModelState:
        """The state that `state_dict` described. Copies into the memories of this state in place.

        Raises:
            StateError: the tensors are of another model, precision, capacity or number of rows;
                nothing is changed then.
        """
        mine = self.state_dict()
        staged_names = {
            f"staged.{layer}.{name}" for layer in self.memories for name in _STAGED_NAMES
        }
        expected = mine.keys() - staged_names
        if staged_names & tensors.keys():
            expected |= staged_names
        if different := sorted(expected ^ tensors.keys()):
            raise StateError(
                f"the saved state and this one differ in {different[0]} (and {len(different) - 1} "
                "more tensors); it belongs to another model"
            )
        for name in sorted(expected):
            if name not in staged_names:
                _check_like(name, tensors[name], mine[name])
            elif not name.endswith("valid"):
                _check_like(name, tensors[name], self.xl_caches[0].keys)
        memory_tensors = {
            layer: {name: tensors[f"memories.{layer}.{name}"] for name in memory.state_dict()}
            for layer, memory in self.memories.items()
        }
        for layer, memory in self.memories.items():
            memory.check_state_dict(memory_tensors[layer])
        for layer, memory in self.memories.items():
            memory.load_state_dict(memory_tensors[layer])

        device = self.xl_caches[0].keys.device

        def take(prefix: str) -> Entries:
            keys, values = (tensors[f"{prefix}.{name}"].to(device) for name in ("keys", "values"))
            return Entries(keys, values)

        return replace(
            self,
            position=tensors["position"].cpu(),
            xl_caches=tuple(take(f"xl_caches.{layer}") for layer in range(len(self.xl_caches))),
            recent=tuple(
                tensors[f"recent.{layer}"].to(device) for layer in range(len(self.recent))
            ),
            staged={
                layer: Staged(take(f"staged.{layer}"), tensors[f"staged.{layer}.valid"].cpu())
                for layer in self.memories
                if staged_names & tensors.keys()
            },
        )


def _check_like(name: str, saved: Tensor, own: Tensor) -> None:
    """Refuse a saved tensor unlike the state's own; their numbers of cached tokens may differ."""
    if name.startswith("memories."):
        return  # a memory checks its own
    grows = not name.startswith("recent.")
    shapes = [
        (*t.shape[:2], *t.shape[3:]) if t.dim() == 4 and grows else tuple(t.shape)
        for t in (saved, own)
    ]
    if shapes[0] != shapes[1] or saved.dtype != own.dtype:
        raise StateError(
            f"{name} of the saved state is {tuple(saved.shape)} {saved.dtype}, expected "
            f"{tuple(own.shape)} {own.dtype}; use the number of rows, precision and model it was "
            "saved with"
        )
