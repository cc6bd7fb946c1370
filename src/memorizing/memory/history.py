"""The history of rows: where each is in its document, and what memory layers keep of what it read.

It is an argument and a result of every call, never part of a model: our own model and the models of
`transformers` have the same one.

Shapes: B rows, H heads, T tokens of a call, n entries, D head_dim.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, Self

import torch
from torch import Tensor

from memorizing.errors import StateError
from memorizing.memory.store import Memory


@dataclass(frozen=True)
class RetrievalControl:
    """Makes retrieval wrong on purpose, to show what the right one is worth."""

    donor_rows: Tensor | None = None
    """(B,) int64: row b reads the memory of row donor_rows[b]."""
    shuffle_values: bool = False
    """Right keys, but the values of random other entries."""
    seed: int = 0


@dataclass(frozen=True)
class Entries:
    """Keys and values (B, H, n, D) of n tokens."""

    keys: Tensor
    values: Tensor
    valid: Tensor | None = None
    """(B, n) bool on the CPU: which are entries; None is all."""
    tokens: Tensor | None = None
    """(B, n) int: of which they are, for memories that keep that."""

    def join(self, newer: Entries) -> Entries:
        """These and newer ones; both say which are entries."""
        assert self.valid is not None
        assert newer.valid is not None
        tokens = None
        if self.tokens is not None and newer.tokens is not None:
            tokens = torch.cat([self.tokens, newer.tokens], 1)
        return Entries(
            torch.cat([self.keys, newer.keys], 2),
            torch.cat([self.values, newer.values], 2),
            torch.cat([self.valid, newer.valid], 1),
            tokens,
        )


def count_hidden(
    position: Tensor, segment_len: int, window: int, first_seen: Tensor | int = 0
) -> Tensor:
    """How many of the newest entries a query must not retrieve: those that local attention sees.

    One softmax must not count a token twice. Entries end with the last segment before the query's.

    Args:
        position: (B, T) int64, of the queries in their documents.
        segment_len: the memory's clock.
        window: tokens that local attention sees.
        first_seen: first token that it could see, if its window were endless; (B, 1).

    Returns:
        (B, T) int64.
    """
    first = (position - window + 1).clamp(min=first_seen)
    return (position // segment_len * segment_len - first).clamp(min=0)


@dataclass(frozen=True, kw_only=True)
class History:
    """The clocks of the rows, and what their memory layers keep.

    A call returns a new history and leaves its own as it was. The memories are the exception that
    makes them cheap: `commit`, `start_documents` and `load_state_dict` change them in place, so a
    history from before is void after these calls, row by row, and refused.
    """

    segment_len: int
    position: Tensor
    """(B,) int64 on the CPU: tokens of its document that each row has read."""
    recent: tuple[Tensor, ...] = ()
    """Per layer, the last tokens' raw keys, or queries and keys (B, H, P, D), where a model mixes
    them (`model/block.py`); else empty."""
    staged: dict[int, Entries] = field(default_factory=dict)
    """Per memory layer, entries that wait for the end of their segment, without gradient."""
    memories: dict[int, Memory]
    """Per memory layer, what was written."""
    generation: Tensor = None  # type: ignore[assignment]
    """(B,) int64 on the CPU: how often each row's memories had been changed when this history was
    made; None takes it from the memories as they are now."""

    def __post_init__(self) -> None:
        """Note the generation."""
        if self.generation is None:
            object.__setattr__(self, "generation", self._count_changes())

    def _count_changes(self) -> Tensor:
        changes = [memory.num_changes for memory in self.memories.values()]
        return torch.stack(changes).sum(0) if changes else torch.zeros_like(self.position)

    @property
    def num_rows(self) -> int:
        """Rows of the batch."""
        return self.position.shape[0]

    def count_pending(self) -> Tensor:
        """(B,) int64 on the CPU: staged entries per row."""
        for staged in self.staged.values():
            assert staged.valid is not None
            return staged.valid.sum(1)
        return torch.zeros_like(self.position)

    def check_step(self, num_new: Tensor, *, may_wait: bool = False) -> None:
        """Refuse a call over a segment boundary, past unwritten entries, or from a void history.

        Args:
            num_new: (B,) tokens of the call.
            may_wait: entries of earlier segments may be unwritten.

        Raises:
            StateError: with the row, what it has and what to do.
        """
        self.check_memories()
        pending = self.count_pending()
        place = self.position % self.segment_len
        crossing = place + num_new > self.segment_len
        if bool(crossing.any()):
            row = int(crossing.nonzero()[0])
            raise StateError(
                f"row {row} is at position {int(self.position[row])} and {int(num_new[row])} more "
                f"tokens would cross a boundary of segments of {self.segment_len}; split the call "
                f"so that at most {self.segment_len - int(place[row])} tokens follow"
            )
        waiting = (num_new > 0) & (place == 0) & (pending > 0)
        if bool(waiting.any()) and not may_wait:
            row = int(waiting.nonzero()[0])
            raise StateError(
                f"row {row} starts a segment with {int(pending[row])} entries of the last one "
                "uncommitted; call state = state.commit() after the backward pass of every segment"
            )

    def check_memories(self) -> None:
        """Refuse a history whose memories went on without it: each token is written or staged once.

        Raises:
            StateError: with the row, where it stands and what to do.
        """
        if not self.memories:
            return
        pending = self.count_pending()
        wrong = self.generation != self._count_changes()
        for memory in self.memories.values():
            wrong = wrong | (memory.num_appended + pending != self.position)
        if bool(wrong.any()):
            row = int(wrong.nonzero()[0])
            taken = [str(int(memory.num_appended[row])) for memory in self.memories.values()]
            raise StateError(
                f"row {row} of this state has read {int(self.position[row])} tokens, of which "
                f"{int(pending[row])} are staged, and its memory has taken {', '.join(taken)}, "
                "perhaps of another document: commit(), start_documents() or load_state_dict() "
                "changed the memories since; go on from the state that the last of them returned"
            )

    def advance(self, valid: Tensor, new: Mapping[int, Entries], **changes: Any) -> Self:
        """The history after a call, whose entries are staged.

        Args:
            valid: (B, T) bool on the CPU: tokens that are not padding.
            new: per layer with a memory, at least, the keys, values and tokens of the call.
            changes: other parts that are new.
        """
        staged = {}
        for layer in self.memories:
            live = new[layer]
            entries = Entries(live.keys.detach(), live.values.detach(), valid, live.tokens)
            before = self.staged.get(layer)
            staged[layer] = entries if before is None else before.join(entries)
        return replace(self, position=self.position + valid.sum(1), staged=staged, **changes)

    def commit(self, *, in_copies: bool = False) -> Self:
        """Write the staged entries of rows that stand at the end of a segment into their memories.

        Call it after the backward pass of a segment. Before the end of a segment it does nothing.
        Changes the memories in place.

        Args:
            in_copies: write to copies of the memories, and leave these as they are.

        Raises:
            StateError: the entries are written already.
        """
        at_boundary = (self.position % self.segment_len == 0) & (self.count_pending() > 0)
        if not bool(at_boundary.any()):
            return self
        self.check_memories()
        memories = self.memories
        if in_copies:
            rows = torch.arange(self.num_rows)
            memories = {layer: memory.select_rows(rows) for layer, memory in memories.items()}
        for layer, waiting in self.staged.items():
            assert waiting.valid is not None
            written = waiting.valid & at_boundary.unsqueeze(1)
            memories[layer].append(waiting.keys, waiting.values, written, waiting.tokens)
        staged = self._keep_staged(~at_boundary)
        return replace(self, staged=staged, memories=memories, generation=None)

    def start_documents(self, doc_start: Tensor) -> Self:
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
        # What caches hold needs no clearing: at position 0 none of it counts.
        return replace(
            self,
            position=self.position.masked_fill(doc_start, 0),
            staged=self._keep_staged(~doc_start),
            generation=torch.where(doc_start, self._count_changes(), self.generation),
        )

    def _keep_staged(self, rows: Tensor) -> dict[int, Entries]:
        """What waits in the rows where the mask (B,) is True, less columns that then hold none."""
        kept = {}
        for layer, waiting in self.staged.items():
            assert waiting.valid is not None
            valid = waiting.valid & rows.unsqueeze(1)
            columns = valid.any(0).nonzero().flatten()
            if len(columns):
                chosen = columns.to(waiting.keys.device, non_blocking=True)
                kept[layer] = Entries(
                    waiting.keys[:, :, chosen],
                    waiting.values[:, :, chosen],
                    valid[:, columns],
                    None if waiting.tokens is None else waiting.tokens[:, chosen],
                )
        return kept

    def select_layer(self, layer: int) -> Self:
        """The same clocks with nothing but one memory layer."""
        return replace(
            self,
            staged={layer: self.staged[layer]} if layer in self.staged else {},
            memories={layer: self.memories[layer]} if layer in self.memories else {},
            generation=None,
        )

    def select_rows(self, rows: Tensor) -> Self:
        """A history of these rows only (an index tensor), in that order, as a copy."""
        rows = rows.cpu()
        self.check_memories()
        return replace(
            self,
            **self._change(lambda _, tensor: tensor[rows]),
            memories={layer: memory.select_rows(rows) for layer, memory in self.memories.items()},
            generation=None,
        )

    def state_dict(self) -> dict[str, Tensor]:
        """All tensors by name, by reference; every one has the rows as its first dimension."""
        tensors: dict[str, Tensor] = {}

        def take(name: str, tensor: Tensor) -> Tensor:
            return tensors.setdefault(name, tensor)

        self._change(take)
        for layer, memory in self.memories.items():
            for name, tensor in memory.state_dict().items():
                tensors[f"memories.{layer}.{name}"] = tensor
        return tensors

    def load_state_dict(self, tensors: Mapping[str, Tensor]) -> Self:
        """The history that `state_dict` described. Copies into its memories in place.

        Raises:
            StateError: the tensors are of another model, precision, capacity or number of rows;
                nothing is changed then.
        """
        staged = {}
        if any(name.startswith("staged.") for name in tensors):
            nothing = torch.zeros(self.num_rows, 0, dtype=torch.bool)
            for layer, memory in self.memories.items():
                tokens = None if memory.tokens is None else memory.tokens[:, :0]
                staged[layer] = Entries(
                    memory.keys[:, :, :0], memory.values[:, :, :0], nothing, tokens
                )
        like = replace(self, staged=staged)
        mine = like.state_dict()
        if different := sorted(mine.keys() ^ tensors.keys()):
            raise StateError(
                f"the saved state and this one differ in {different[0]} (and {len(different) - 1} "
                "more tensors); it belongs to another model"
            )
        for name, own in mine.items():
            _check_like(name, tensors[name], own)
        parts = {
            layer: {name: tensors[f"memories.{layer}.{name}"] for name in memory.state_dict()}
            for layer, memory in self.memories.items()
        }
        for layer, memory in self.memories.items():
            memory.check_state_dict(parts[layer])
        for layer, memory in self.memories.items():
            memory.load_state_dict(parts[layer])
        loaded = like._change(lambda name, own: tensors[name].to(own.device))
        return replace(like, **loaded, generation=None)

    def _change(self, change: Callable[[str, Tensor], Tensor]) -> dict[str, Any]:
        """All parts but the memories, with every tensor changed; it is told its name."""

        def walk(part: Any, name: str) -> Any:
            if isinstance(part, Tensor):
                return change(name, part)
            if isinstance(part, tuple):
                return tuple(walk(one, f"{name}.{place}") for place, one in enumerate(part))
            if isinstance(part, dict):
                return {key: walk(one, f"{name}.{key}") for key, one in part.items()}
            if isinstance(part, Entries):
                return Entries(
                    **{key: walk(one, f"{name}.{key}") for key, one in vars(part).items()}
                )
            return part

        names = [one.name for one in fields(self) if one.name not in ("memories", "generation")]
        return {name: walk(getattr(self, name), name) for name in names}


def _check_like(name: str, saved: Tensor, own: Tensor) -> None:
    """Refuse a saved tensor unlike the state's own; their numbers of tokens may differ."""
    kind = name.partition(".")[0]
    if kind == "memories":
        return  # a memory checks its own
    seen, expected = (list(tensor.shape) for tensor in (saved, own))
    if kind in ("xl_caches", "staged"):
        place = 1 if name.endswith((".valid", ".tokens")) else 2
        seen, expected = seen[:place] + seen[place + 1 :], expected[:place] + expected[place + 1 :]
    # What is staged has the precision of the model, which the caches show, not of the memory.
    if seen != expected or (saved.dtype != own.dtype and kind != "staged"):
        raise StateError(
            f"{name} of the saved state is {tuple(saved.shape)} {saved.dtype}, expected "
            f"{tuple(own.shape)} {own.dtype}; use the number of rows, precision and model it was "
            "saved with"
        )
