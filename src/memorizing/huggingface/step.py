"""One call of a model with memory: where its rows stand, and what a memory layer does in it.

Shapes: B rows, H heads of queries, H_kv heads of keys, T tokens of the call, D head_dim.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from memorizing.errors import StateError
from memorizing.huggingface.memory_head import MemoryHead
from memorizing.huggingface.memory_settings import MemorySettings
from memorizing.index_settings import parse_index
from memorizing.memory import Memory, Retrieved
from memorizing.memory.frozen import FrozenMemory
from memorizing.memory.retrieved import keep_best
from memorizing.model import ModelState, RetrievalControl
from memorizing.model.state import Entries, Staged

Parts = tuple[Retrieved, ...]
OnRetrieved = Callable[[int, Sequence[Tensor], Sequence[Tensor | None]], None]
"""Layer; per part, shares of attention (B, H, T, k); per part, numbers of entries, or None for the
text's own memory."""


@dataclass
class History:
    """What belongs to one cache: the memory layers' clocks and the entries of its own text."""

    states: dict[int, ModelState]
    """Per memory layer, a state with its memory; all stand at the same positions."""
    num_seen: int = 0
    """Columns of the cache so far, padding included."""
    is_broken: bool = False
    """A call began and did not end."""

    @property
    def position(self) -> Tensor:
        """(B,) int64 on the CPU: tokens of its text that each row has read."""
        return next(iter(self.states.values())).position

    def commit(self) -> None:
        """Write what waits for the end of its segment, where that has come. In place."""
        self.states = {layer: state.commit() for layer, state in self.states.items()}


def make_history(
    settings: MemorySettings,
    num_rows: int,
    num_heads: int,
    head_dim: int,
    dtype: torch.dtype,
    device: torch.device,
    *,
    without: int | None = None,
) -> History:
    """A history of nothing for `num_rows` texts; the layer `without` will remember nothing."""
    states = {}
    for layer in settings.layers:
        memories = {}
        if settings.capacity and layer != without:
            index = parse_index(settings.index)
            memories[layer] = Memory(
                num_rows, num_heads, settings.capacity, head_dim, dtype, device, index
            )
        states[layer] = ModelState(
            settings.segment_len, torch.zeros(num_rows, dtype=torch.int64), (), (), {}, memories
        )
    return History(states)


@dataclass
class Step:
    """One call. Made before it, used by its memory layers, taken over after it."""

    history: History
    valid: Tensor
    """(B, T) bool on the CPU: tokens that are not padding."""
    base: dict[int, FrozenMemory]
    """Per memory layer, what was read before; may be empty."""
    needs_graph: bool
    """Whether the call may be followed by a backward pass: memories must not change in it."""
    is_reading: bool = True
    """Whether memory layers retrieve."""
    control: RetrievalControl | None = None
    """Retrieval that is wrong on purpose."""
    next_states: dict[int, ModelState] = field(default_factory=dict)
    collected: dict[int, tuple[Tensor, Tensor]] | None = None
    """Given, the call only reads: it takes the keys and values (B, H_kv, T, D) of every layer, and
    ends with the last memory layer."""
    on_retrieved: OnRetrieved | None = None
    """Told of what is retrieved, where asked for."""

    def check(self) -> None:
        """Refuse a call that would write to memories that its own backward pass reads.

        Raises:
            StateError: with the row and what to do.
        """
        num_new = self.valid.sum(1)
        for state in self.history.states.values():
            state.check_step(num_new if self.needs_graph else torch.zeros_like(num_new))

    def run_layer(
        self,
        layer: int,
        head: MemoryHead,
        settings: MemorySettings,
        queries: Tensor,
        keys: Tensor,
        values: Tensor,
        scaling: float,
        softcap: float | None,
    ) -> tuple[Tensor, Tensor, Tensor] | None:
        """Retrieve for all tokens of the call, and stage their entries.

        Args:
            layer: its number.
            head: its gates.
            settings: of the memory.
            queries: (B, H, T, D), free of positions.
            keys: (B, H_kv, T, D), free of positions, of the tokens of this call.
            values: (B, H_kv, T, D).
            scaling: of the layer.
            softcap: bound of the layer's scores, or None.

        Returns:
            As `MemoryHead.attend`; None where nothing at all is stored.
        """
        state = self.history.states[layer]
        outputs = []
        for start, stop in self._split(state.position, settings.segment_len):
            span = slice(start, stop)
            if not self.needs_graph:
                # Entries of segments that ended in this call or before it are retrievable now.
                state = state.commit()
            parts = self._retrieve(layer, state, settings, queries[:, :, span], span)
            asked = queries[:, :, span]
            if self.on_retrieved is not None and parts:
                self._tell(layer, head, parts, scaling)
            outputs.append(head.attend(asked, parts, scaling, softcap) if parts else asked)
            state = self._stage(layer, state, keys[:, :, span], values[:, :, span], span)
        self.next_states[layer] = state
        if not any(isinstance(output, tuple) for output in outputs):
            return None
        filled = [
            output
            if isinstance(output, tuple)
            else (torch.zeros_like(output), *_find_nothing(output))
            for output in outputs
        ]
        if len(filled) == 1:
            return filled[0]
        memory, total, found = zip(*filled, strict=True)
        return torch.cat(memory, 2), torch.cat(total, 2), torch.cat(found, 2)

    def _split(self, position: Tensor, segment_len: int) -> Iterator[tuple[int, int]]:
        """Columns of the call between boundaries of segments of any row."""
        num_columns = self.valid.shape[1]
        count = self.valid.cumsum(1)
        # A boundary comes after the column whose token ends a segment of its row.
        ends = ((position.unsqueeze(1) + count) % segment_len == 0) & self.valid
        cuts = [column + 1 for column in ends.any(0).nonzero().flatten().tolist()]
        start = 0
        for stop in [*cuts, num_columns]:
            if stop > start:
                yield start, stop
            start = stop

    def _retrieve(
        self,
        layer: int,
        state: ModelState,
        settings: MemorySettings,
        queries: Tensor,
        span: slice,
    ) -> Parts:
        parts: list[Retrieved] = []
        if not self.is_reading:
            return ()
        k, control = settings.num_neighbors, self.control
        base = self.base.get(layer)
        if base is not None and base.size and control is None:
            parts += base.retrieve(queries, k)
        memory = state.memories.get(layer)
        if memory is not None and bool((memory.size > 0).any()):
            hidden = None
            if settings.combine == "joint":
                hidden = self._count_hidden(state, settings, span)
            shuffled = control is not None and control.shuffle_values
            donors = None if control is None else control.donor_rows
            found = memory.retrieve(
                queries,
                k,
                num_hidden=hidden,
                donor_rows=donors,
                value_seed=control.seed if control is not None and shuffled else None,
            )
            if settings.num_sinks:
                position = memory.compute_positions(found.neighbors.slots, donors)
                found = _leave_out(found, position < settings.num_sinks)
            parts.append(found)
        return keep_best(parts, k) if len(parts) > 1 else tuple(parts)

    def _tell(self, layer: int, head: MemoryHead, parts: Parts, scaling: float) -> None:
        """Report what was retrieved, with its shares of attention among all that was."""
        assert self.on_retrieved is not None
        scale = (torch.exp(head.log_scale.detach()) * scaling).view(-1, 1, 1)
        scores = torch.cat([part.neighbors.scores.float() for part in parts], -1) * scale
        weights = torch.softmax(scores, -1).nan_to_num(0.0)
        widths = [part.neighbors.scores.shape[-1] for part in parts]
        base = self.base.get(layer)
        firsts: list[int | None] = list(base.first_entries) if base is not None else []
        firsts += [None] * (len(parts) - len(firsts))
        entries = [
            None if first is None else part.neighbors.slots + first
            for first, part in zip(firsts, parts, strict=True)
        ]
        self.on_retrieved(layer, weights.split(widths, -1), entries)

    def finish(self) -> None:
        """Take over what the layers of the call staged. Changes the history."""
        history = self.history
        num_new = self.valid.sum(1)
        for layer, state in history.states.items():
            # A layer that is only read from has no memory of its own, and nothing staged.
            moved = replace(state, position=state.position + num_new)
            history.states[layer] = self.next_states.get(layer, moved)
        history.num_seen += self.valid.shape[1]
        history.is_broken = False

    def _count_hidden(self, state: ModelState, settings: MemorySettings, span: slice) -> Tensor:
        """(B, n): newest entries that a query must not retrieve, since local attention sees them.

        One softmax must not count a token twice.
        """
        count = self.valid[:, span].cumsum(1)
        offset = (state.position.unsqueeze(1) + count - 1).clamp(min=0) % settings.segment_len
        return (settings.window - 1 - offset).clamp(min=0)

    def _stage(
        self, layer: int, state: ModelState, keys: Tensor, values: Tensor, span: slice
    ) -> ModelState:
        valid = self.valid[:, span]
        position = state.position + valid.sum(1)
        staged = dict(state.staged)
        if state.memories:
            new = Entries(keys.detach(), values.detach())
            before = staged.get(layer)
            if before is not None:
                new = Entries(
                    torch.cat([before.entries.keys, new.keys], 2),
                    torch.cat([before.entries.values, new.values], 2),
                )
                valid = torch.cat([before.valid, valid], 1)
            staged[layer] = Staged(new, valid)
        return ModelState(state.segment_len, position, (), (), staged, state.memories)


def _leave_out(part: Retrieved, left_out: Tensor) -> Retrieved:
    """What was found, less where the mask is True."""
    neighbors = part.neighbors
    valid = neighbors.valid & ~left_out
    scores = neighbors.scores.masked_fill(~valid, -torch.inf)
    return replace(part, neighbors=replace(neighbors, valid=valid, scores=scores))


def _find_nothing(queries: Tensor) -> tuple[Tensor, Tensor]:
    shape = queries.shape[:3]
    total = torch.full(shape, -torch.inf, device=queries.device)
    return total, torch.zeros(shape, dtype=torch.bool, device=queries.device)


def check_valid(valid: Tensor) -> None:
    """Refuse padding between the tokens of a row.

    Raises:
        StateError: with the row.
    """
    stretches = valid[:, :1].sum(1) + (valid[:, 1:] & ~valid[:, :-1]).sum(1)
    if bool((stretches > 1).any()):
        row = int((stretches > 1).nonzero()[0])
        raise StateError(
            f"row {row} of attention_mask has padding between its tokens; pad on the left"
        )
