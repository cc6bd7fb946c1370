"""One call of a model with memory: where its rows stand, and what a memory layer does in it.

Shapes: B rows, H heads of queries, H_kv heads of keys, T tokens of the call, D head_dim.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from torch import Tensor

from memorizing.errors import StateError
from memorizing.huggingface.attaching.memory_settings import MemorySettings
from memorizing.huggingface.attaching.open_heads import OpenHeads
from memorizing.index_settings import parse_index
from memorizing.memory import Entries, History, Memory, RetrievalControl, Retrieved
from memorizing.memory.frozen import FrozenMemory
from memorizing.memory.history import count_hidden
from memorizing.memory.retrieved import keep_best

OnRetrieved = Callable[[int, Sequence[Tensor], Sequence[Tensor | None]], None]
"""Layer; per part, shares of attention (B, H, T, k) of the heads that read; per part, numbers of
entries, or None for the text's own memory."""


@dataclass
class TextState:
    """What belongs to the texts of one cache besides their keys and values."""

    shift: Tensor = field(default_factory=lambda: torch.zeros(1, 1, dtype=torch.int64))
    """(B or 1, 1) int64 on the CPU: how far positions are moved back now."""
    history: History | None = None
    """What they have in memory, and the memory layers' clock, where a memory is open."""
    open_heads: Mapping[int, OpenHeads] = field(default_factory=dict)
    """Per memory layer, the heads that its memory has."""
    binding: int | None = None
    """Of the open memory that the history belongs to."""
    has_ended: Tensor | None = None
    """(B,) bool on the CPU: rows whose last column was padding after their tokens; None is none."""
    is_broken: bool = False
    """A call began and did not end."""


def make_history(
    settings: MemorySettings,
    num_rows: int,
    open_heads: Mapping[int, OpenHeads],
    head_dim: int,
    dtype: torch.dtype,
    devices: Mapping[int, torch.device],
    *,
    without: int | None = None,
) -> History:
    """A history of nothing for `num_rows` texts; the layer `without` will remember nothing."""
    index = parse_index(settings.index)
    return History(
        segment_len=settings.segment_len,
        position=torch.zeros(num_rows, dtype=torch.int64),
        memories={
            layer: Memory(
                num_rows,
                len(open_heads[layer].key_heads),
                settings.capacity,
                head_dim,
                dtype,
                devices[layer],
                index,
            )
            for layer in settings.layers
            if settings.capacity and open_heads[layer].is_any and layer != without
        },
    )


@dataclass(frozen=True)
class Found:
    """What was retrieved for some columns of the call, in one or more stores."""

    columns: slice
    parts: tuple[Retrieved, ...]
    """At most k over all of them for each query."""
    first_entries: tuple[int | None, ...]
    """Per part, the number of the entry in its slot 0; None for the text's own memory."""


@dataclass
class Step:
    """One call. Made before it, used by its memory layers, part of the texts' history after it.

    It keeps the history from before the call, so that a layer may be computed again by the backward
    pass, after the history went on.
    """

    text: TextState
    settings: MemorySettings
    valid: Tensor
    """(B, T) bool on the CPU: tokens that are not padding."""
    first_seen: Tensor
    """(B,) int64 on the CPU: the first token of each row that local attention could see, if its
    window were endless."""
    base: Mapping[int, FrozenMemory]
    """Per memory layer, what was read before; may be empty."""
    needs_graph: bool
    """Whether the call may be followed by a backward pass: memories must not change in it."""
    is_reading: bool = True
    """Whether memory layers retrieve."""
    control: RetrievalControl | None = None
    """Retrieval that is wrong on purpose."""
    collected: dict[int, tuple[Tensor, Tensor]] | None = None
    """Given, the call only reads: it takes the keys and values (B, H_kv, T, D) of every layer, and
    ends with the last memory layer."""
    on_retrieved: OnRetrieved | None = None
    """Told of what is retrieved, where asked for."""
    is_cut: bool = False
    """The call has ended with the last memory layer."""
    history: History = field(init=False)
    """From before the call."""
    _after: dict[int, History] = field(init=False, default_factory=dict)
    """Per memory layer that has done its part, what it made of the history."""

    def __post_init__(self) -> None:
        """Keep where the rows stand.

        Raises:
            StateError: padding between the tokens of a row; with gradients, a call over a boundary
                of segments, or one past entries that are not committed.
        """
        assert self.text.history is not None
        self.history = self.text.history
        self._check_padding()
        if not self.needs_graph:
            self.history.check_memories()
            return
        try:
            self.history.check_step(self.valid.sum(1))
        except StateError as error:
            raise StateError(
                f"{error} (here: memory.commit(cache)); under torch.no_grad() the model does "
                "both by itself"
            ) from None

    def _check_padding(self) -> None:
        has_ended = self.text.has_ended
        has_ended = torch.zeros_like(self.valid[:, 0]) if has_ended is None else has_ended
        before = torch.cat([has_ended.unsqueeze(1), ~self.valid[:, :-1]], 1)
        started = torch.cat(
            [self.history.position.unsqueeze(1) > 0, self.valid[:, :-1].cumsum(1) > 0], 1
        )
        wrong = self.valid & before & (started.cumsum(1) > 0)
        if bool(wrong.any()):
            row = int(wrong.any(1).nonzero()[0])
            raise StateError(
                f"row {row} of attention_mask has padding between its tokens; pad on the left"
            )

    @cached_property
    def _spans(self) -> tuple[slice, ...]:
        """Columns of the call between boundaries of segments of any row."""
        count = self.history.position.unsqueeze(1) + self.valid.cumsum(1)
        # A boundary comes after the column whose token ends a segment of its row.
        ends = (count % self.settings.segment_len == 0) & self.valid
        cuts = [column + 1 for column in ends.any(0).nonzero().flatten().tolist()]
        starts = sorted({0, *cuts, self.valid.shape[1]})
        return tuple(slice(*pair) for pair in zip(starts, starts[1:], strict=False))

    def walk(
        self, layer: int, window: int, queries: Tensor, keys: Tensor, values: Tensor
    ) -> Iterator[Found]:
        """Retrieve for the tokens of the call, span after span, and stage their entries.

        What was found must be used before the next is asked for, which may write to the memory.

        Args:
            layer: a memory layer.
            window: tokens that its local attention sees.
            queries: (B, P, T, D), free of positions, as `OpenHeads.ask` gives them.
            keys: (B, K, T, D), free of positions, of the tokens of this call, as
                `OpenHeads.take_keys` gives them.
            values: (B, K, T, D).
        """
        if self.needs_graph:
            self._check_unchanged()
        history = self.history.select_layer(layer)
        for span in self._spans:
            if not self.needs_graph:
                # Entries of segments that ended in this call or before it are retrievable now.
                history = history.commit()
            yield self._retrieve(layer, history, window, queries[:, :, span], span)
            new = Entries(keys[:, :, span], values[:, :, span])
            history = history.advance(self.valid[:, span], {layer: new})
        self._after[layer] = history

    def _check_unchanged(self) -> None:
        """Refuse to compute again after memories were written."""
        try:
            self.history.check_memories()
        except StateError:
            raise StateError(
                "the memory was written between the forward pass and its backward pass, which "
                "computes layers again; call memory.commit(cache) after backward()"
            ) from None

    def _retrieve(
        self, layer: int, history: History, window: int, queries: Tensor, span: slice
    ) -> Found:
        parts: list[Retrieved] = []
        firsts: list[int | None] = []
        if not self.is_reading:
            return Found(span, (), ())
        k = self.settings.num_neighbors
        base = self.base.get(layer)
        if base is not None and base.size and self.control is None:
            parts += base.retrieve(queries, k)
            firsts += base.first_entries
        memory = history.memories.get(layer)
        has_sinks = False
        if memory is not None and bool((memory.size > 0).any()):
            # Sinks are left out of what is found, until they are evicted.
            first_stored = memory.num_appended - memory.size
            has_sinks = bool((first_stored < self.settings.num_sinks).any())
            num_more = self.settings.num_sinks if has_sinks else 0
            parts.append(self._search(memory, history, window, queries, span, k + num_more))
            firsts.append(None)
        best = keep_best(parts, k) if len(parts) > 1 or has_sinks else tuple(parts)
        return Found(span, best, tuple(firsts))

    def _search(
        self,
        memory: Memory,
        history: History,
        window: int,
        queries: Tensor,
        span: slice,
        num_neighbors: int,
    ) -> Retrieved:
        """What a text's own memory has for it, less what local attention sees."""
        control = self.control or RetrievalControl()
        num_hidden = None
        if self.settings.combine == "joint":
            token = history.position.unsqueeze(1) + self.valid[:, span].cumsum(1) - 1
            first_seen = self.first_seen.unsqueeze(1)
            num_hidden = count_hidden(token, self.settings.segment_len, window, first_seen)
        found = memory.retrieve(
            queries,
            num_neighbors,
            num_hidden=num_hidden,
            donor_rows=control.donor_rows,
            value_seed=control.seed if control.shuffle_values else None,
        )
        position = memory.compute_positions(found.neighbors.slots, control.donor_rows)
        return _leave_out(found, position < self.settings.num_sinks)

    def tell(self, layer: int, found: Found, shares: Sequence[Tensor]) -> None:
        """Report what was retrieved, with its shares of attention; not of padding.

        `shares` (B, H_open, T, k) are of the heads that read.
        """
        if self.on_retrieved is None or not found.parts:
            return
        keep = self.text.open_heads[layer].keep
        entries = [
            None if first is None else keep(part.neighbors.slots) + first
            for first, part in zip(found.first_entries, found.parts, strict=True)
        ]
        valid = self.valid[:, None, found.columns, None]
        self.on_retrieved(layer, [share * valid.to(share.device) for share in shares], entries)

    def finish(self) -> None:
        """Take over what the layers of the call staged. Changes the texts' history."""
        staged = {
            layer: waiting
            for layer, waiting in self.history.staged.items()
            if layer not in self._after
        }
        for history in self._after.values():
            staged |= history.staged
        position = self.history.position + self.valid.sum(1)
        self.text.history = replace(self.history, position=position, staged=staged, generation=None)
        self.text.has_ended = ~self.valid[:, -1] & (position > 0)
        self.text.is_broken = False


def _leave_out(part: Retrieved, left_out: Tensor) -> Retrieved:
    """What was found, less where the mask is True."""
    neighbors = part.neighbors
    valid = neighbors.valid & ~left_out
    scores = neighbors.scores.masked_fill(~valid, -torch.inf)
    return replace(part, neighbors=replace(neighbors, valid=valid, scores=scores))
