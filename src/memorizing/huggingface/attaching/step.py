"""One call of a model with memory: where its rows stand, and what its memory layers do in it.

Shapes: B rows, H heads of queries, H_kv heads of keys, S keys, T tokens of the call, D head_dim.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from memorizing.errors import StateError
from memorizing.huggingface.attaching.decoder import Decoder
from memorizing.huggingface.attaching.finding import Shelf
from memorizing.huggingface.attaching.interface import Attention
from memorizing.huggingface.attaching.memory_layer import (
    Attended,
    MemoryLayer,
    OpenHeads,
    sum_local_scores,
)
from memorizing.huggingface.attaching.memory_settings import MemorySettings
from memorizing.huggingface.attaching.passage_room import Library, Passage, Searched
from memorizing.huggingface.attaching.passages import LAST, Collection
from memorizing.huggingface.attaching.window_cache import TextState
from memorizing.index_settings import IndexSettings
from memorizing.memory import Entries, History, Memory, RetrievalControl, Retrieved
from memorizing.memory.frozen import FrozenMemory, SearchedMemory
from memorizing.memory.history import count_hidden
from memorizing.memory.retrieved import keep_best


@dataclass(frozen=True)
class Finding:
    """What the heads of a layer that read found in one store, for some tokens of a call."""

    shares: Tensor
    """(B, H, T, k): of the attention to all that was retrieved; 0 of padding, and of no entry."""
    scores: Tensor
    """(B, H, T, k): larger is nearer; -inf of no entry."""
    entries: Tensor
    """(B, H, T, k) int64: numbers of entries of the open memory, from the first that was read; of
    the text's own memory, their tokens, counted from its beginning."""
    is_own: bool
    """Whether they are of the text's own memory."""
    passage: Passage | None = None
    """The one that is in sight for them, where passages are read: the entries are its chunk's."""
    since: int = 0
    """Tokens of the text that are read before it is in sight."""


OnRetrieved = Callable[[int, Sequence[Finding], Tensor], None]
"""Layer; per store, what was found; the gates (B, H, T): shares of these heads' attention that go
to what was retrieved."""


class EntriesRead(Exception):
    """A call has all entries, or queries, that it is made for: nothing above is needed."""


@dataclass(frozen=True)
class OpenMemory:
    """What the texts of a model read besides their own memories."""

    number: int
    """Tells memories that are opened one after another apart."""
    base: Mapping[int, SearchedMemory]
    """Per memory layer, what was read before; may be empty."""
    open_heads: Mapping[int, OpenHeads]
    """Per memory layer, the heads that read: those whose gates were open when it was opened."""
    devices: Mapping[int, torch.device]
    """Per memory layer, where it computed then."""
    library: Library | None = None
    """The documents of `base`, where passages are read."""

    @cached_property
    def collection(self) -> Collection:
        """What passages are found among in this process."""
        layers = {
            layer: memory for layer, memory in self.base.items() if isinstance(memory, FrozenMemory)
        }
        if self.library is None:
            return Collection((), layers)
        lengths, special_ids = tuple(self.library.num_entries), self.library.special_ids
        return Collection(lengths, layers, self.library.read_ids, special_ids=special_ids)

    @cached_property
    def searched(self) -> Searched:
        """Where passages are found besides a text itself."""
        if self.library is None:
            return Shelf(self.collection, None)
        return self.library.shelve(self.collection)


@dataclass(frozen=True)
class Collector:
    """Takes the entries of a call that only reads, and ends with the last of them."""

    decoder: Decoder
    layers: tuple[int, ...]
    """Whose entries are wanted, ascending."""
    entries: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    """Per layer, keys and values (B, H_kv, T, D)."""


@dataclass(frozen=True)
class CallMode:
    """How one thread, or task, calls a model for a while; others do not notice."""

    opened: OpenMemory | None = None
    """Read in the place of what is open for all."""
    capacity: int | None = None
    """Of the memories of texts that begin now; None is that of the settings."""
    index: IndexSettings | None = None
    """What searches these memories; None is that of the settings."""
    is_reading: bool = True
    """Memory layers retrieve."""
    control: RetrievalControl | None = None
    """Retrieval that is wrong on purpose."""
    strengths: Mapping[int, Tensor] = field(default_factory=dict)
    """Per memory layer, (H,): shares of what the memory changes that are let through."""
    collected: Collector | None = None
    """Given, calls only read."""
    listeners: tuple[OnRetrieved, ...] = ()
    """Told of what is retrieved."""
    asked: dict[int, Tensor] | None = None
    """Given, calls change nothing: they give what every layer with open heads asks for passages,
    (B, P, T, D), and end with the last."""
    window: int | None = None
    """Tokens that local attention sees; None is that of the settings."""
    is_plain: bool = False
    """Calls are those of a model without memory or window."""
    looks_ahead: bool = True
    """A call of several tokens looks for passages by its own last ones, so that all of them see
    what these find. Otherwise by those of the calls before, as if they were written one by one."""
    passages: tuple[Passage, ...] | None = None
    """Given, these stand in the room, the first one last, and none are looked for."""


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
    base: Mapping[int, SearchedMemory]
    """Per memory layer, what was read before; may be empty."""
    mode: CallMode
    needs_graph: bool
    """Whether the call may be followed by a backward pass: memories must not change in it."""
    ids: Tensor | None = None
    """(B, T): what was read; None where only embeddings are known."""
    is_cut: bool = False
    """The call has ended with the last memory layer."""
    history: History = field(init=False)
    """From before the call."""
    _after: dict[int, History] = field(init=False, default_factory=dict)
    """Per memory layer that has done its part, what it made of the history."""
    _queries: dict[int, Tensor] = field(init=False, default_factory=dict)
    """Per layer that finds passages, its last queries."""

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
        follows_padding = torch.cat([has_ended.unsqueeze(1), ~self.valid[:, :-1]], 1)
        count = self.history.position.unsqueeze(1) + self.valid.cumsum(1)
        wrong = self.valid & follows_padding & (count > 1)
        if bool(wrong.any()):
            row = int(wrong.any(1).nonzero()[0])
            raise StateError(
                f"row {row} of attention_mask has padding between its tokens; pad on the left"
            )

    @property
    def is_written(self) -> bool:
        """Whether passages are found as where a text is written: by nothing of this call."""
        return self.valid.shape[1] == 1 or not self.mode.looks_ahead

    @cached_property
    def _spans(self) -> tuple[slice, ...]:
        """Columns of the call between boundaries of segments of any row."""
        count = self.history.position.unsqueeze(1) + self.valid.cumsum(1)
        # A boundary comes after the column whose token ends a segment of its row.
        ends = (count % self.settings.segment_len == 0) & self.valid
        cuts = [column + 1 for column in ends.any(0).nonzero().flatten().tolist()]
        starts = sorted({0, *cuts, self.valid.shape[1]})
        return tuple(slice(*pair) for pair in zip(starts, starts[1:], strict=False))

    @torch.compiler.disable
    def add(self, layer: MemoryLayer, local: Attention) -> Tensor:
        """The output of local attention (B, T, H, D), with what the memory has for it.

        The entries of the call are staged, segment after segment. Autocast has chosen the dtypes
        of what is given, and is off in here.

        Args:
            layer: of this attention.
            local: what it was given, and gave. Queries (B, H, T, D) and keys (B, H_kv, S, D) are
                rotated; the last T keys and values (B, H_kv, S, D) are of this call.

        Raises:
            EntriesRead: nothing more of this call is needed.
        """
        with torch.autocast(local.query.device.type, enabled=False):
            return self._add(layer, *local)

    @torch.compiler.disable
    def collect(self, attention: nn.Module, local: Attention) -> None:
        """Take the entries of a layer without memory, where all are kept.

        Args:
            attention: of this layer.
            local: as in `add`.

        Raises:
            EntriesRead: as in `add`.
        """
        collector = self.mode.collected
        assert collector is not None
        number = collector.decoder.attentions.index(attention)
        if number in collector.layers:
            new = slice(-local.query.shape[2], None)
            key, value = local.key[:, :, new], local.value[:, :, new]
            with torch.autocast(key.device.type, enabled=False):
                entries = collector.decoder.free_entries(number, key, value, local.kwargs)
            self._give(number, entries)

    def _give(self, number: int, entries: tuple[Tensor, Tensor]) -> None:
        collector = self.mode.collected
        assert collector is not None
        collector.entries[number] = entries
        if number == collector.layers[-1]:
            self.is_cut = True
            raise EntriesRead

    def _add(
        self,
        layer: MemoryLayer,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        scaling: float | None,
        kwargs: dict[str, Any],
        output: Tensor,
    ) -> Tensor:
        number, new = layer.layer, slice(-query.shape[2], None)
        scaling = 1.0 / math.sqrt(query.shape[-1]) if scaling is None else scaling
        softcap = kwargs.get("softcap")
        entries = layer.free_entries(key[:, :, new], value[:, :, new], kwargs)
        if self.mode.collected is not None:
            self._give(number, entries)
            if self.settings.finds_passages:
                return output
        heads = self.text.open_heads[number]
        if not heads.is_any:
            return output
        asked = layer.free(heads.ask(query), kwargs, distance=self.settings.distance)
        if self.settings.finds_passages:
            self._queries[number] = layer.scale(asked, scaling, heads).detach()[:, :, -LAST:]
            if self.mode.asked is not None:
                self._give_queries()
                return output
        keys, values = (heads.take_keys(part) for part in entries)
        if self.needs_graph:
            self._check_unchanged()
        history = self.history.select_layer(number)
        attended: list[Attended] = []
        findings: list[tuple[slice, tuple[Finding, ...]]] = []
        for span in self._spans:
            if not self.needs_graph:
                # Entries of segments that ended in this call or before it are retrievable now.
                history = history.commit()
            parts, firsts = self._retrieve(layer, history, asked[:, :, span], span)
            # Used before the memory is written to again.
            part = layer.attend(asked[:, :, span], parts, scaling, softcap, heads)
            if self.mode.listeners and parts:
                memory = history.memories.get(number)
                findings.append((span, self._describe(memory, span, parts, firsts, part, heads)))
            attended.append(part)
            staged = Entries(keys[:, :, span], values[:, :, span])
            history = history.advance(self.valid[:, span], {number: staged})
        self._after[number] = history
        if not any(part.shares for part in attended):
            return output
        memory = Attended(
            # Of what was stored, values shorter than keys end with zeros.
            torch.cat([part.output for part in attended], 2)[..., : value.shape[-1]],
            torch.cat([part.log_sum for part in attended], 2),
        )
        local_sum = None
        if layer.joint:
            if mask is not None and mask.dim() == 4 and mask.shape[1] > 1:
                mask = heads.ask(mask)
            sink = kwargs.get("s_aux")
            local_sum = sum_local_scores(
                heads.ask(query),
                heads.take_keys(key),
                mask,
                scaling,
                softcap,
                None if sink is None else heads.ask(sink.view(1, -1, 1)),
            )
            local_sum = heads.keep(local_sum)
        local = output.transpose(1, 2)
        if findings:
            self._tell(number, findings, layer.find_gates(memory, local_sum, heads.heads))
        strength = self.mode.strengths.get(number)
        if heads.heads is None:
            mixed = layer.mix(local, memory, local_sum, strength=strength)
        else:
            mine = local.index_select(1, heads.heads)
            mine = layer.mix(mine, memory, local_sum, heads.heads, strength)
            mixed = local.index_copy(1, heads.heads, mine.to(local.dtype))
        # As attention gives it: some families view it otherwise.
        return mixed.transpose(1, 2).contiguous()

    def _give_queries(self) -> None:
        assert self.mode.asked is not None
        self.mode.asked.update(self._queries)
        if len(self._queries) == sum(heads.is_any for heads in self.text.open_heads.values()):
            self.is_cut = True
            raise EntriesRead

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
        self, layer: MemoryLayer, history: History, queries: Tensor, span: slice
    ) -> tuple[tuple[Retrieved, ...], list[int | None]]:
        """What a layer finds for some columns of the call, in one or more stores.

        Of a text's own memory, what local attention sees is left out where one softmax would count
        it twice, and sinks are, until they are evicted.

        Args:
            layer: that asks.
            history: of this layer, before these columns.
            queries: (B, P, n, D), as `OpenHeads.ask` gives them.
            span: the columns.

        Returns:
            Per store, what was found, at most k over all of them for each query; and the number of
            the entry in its slot 0, None for the text's own memory.
        """
        settings, control = self.settings, self.mode.control
        parts: list[Retrieved] = []
        firsts: list[int | None] = []
        if not self.mode.is_reading or settings.read == "passages":
            return (), []
        base, memory = self.base.get(layer.layer), history.memories.get(layer.layer)
        if base is not None and base.size and control is None:
            parts += base.retrieve(queries, settings.num_neighbors)
            firsts += base.first_entries
        has_sinks = False
        if memory is not None and bool((memory.size > 0).any()):
            has_sinks = bool((memory.num_appended - memory.size < settings.num_sinks).any())
            num_hidden = None
            if settings.combine == "joint":
                token = history.position.unsqueeze(1) + self.valid[:, span].cumsum(1) - 1
                first_seen = self.first_seen.unsqueeze(1)
                num_hidden = count_hidden(token, settings.segment_len, layer.window, first_seen)
            control = control or RetrievalControl()
            found = memory.retrieve(
                queries,
                settings.num_neighbors + (settings.num_sinks if has_sinks else 0),
                num_hidden=num_hidden,
                donor_rows=control.donor_rows,
                value_seed=control.seed if control.shuffle_values else None,
            )
            position = memory.compute_positions(found.neighbors.slots, control.donor_rows)
            valid = found.neighbors.valid & (position >= settings.num_sinks)
            scores = found.neighbors.scores.masked_fill(~valid, -torch.inf)
            neighbors = replace(found.neighbors, valid=valid, scores=scores)
            parts.append(replace(found, neighbors=neighbors))
            firsts.append(None)
        if len(parts) > 1 or has_sinks:
            return keep_best(parts, settings.num_neighbors), firsts
        return tuple(parts), firsts

    def _describe(
        self,
        memory: Memory | None,
        span: slice,
        parts: Sequence[Retrieved],
        firsts: Sequence[int | None],
        attended: Attended,
        heads: OpenHeads,
    ) -> tuple[Finding, ...]:
        """What was retrieved for some columns, per store, for listeners."""
        donors = None if self.mode.control is None else self.mode.control.donor_rows
        is_token = self.valid[:, None, span, None]
        findings = []
        for part, first, shares in zip(parts, firsts, attended.shares, strict=True):
            slots, valid = part.neighbors.slots, part.neighbors.valid
            scores = part.neighbors.scores.detach().masked_fill(~valid, -torch.inf)
            if first is None:
                assert memory is not None
                entries = memory.compute_positions(slots, donors)
            else:
                entries = slots + first
            findings.append(
                Finding(
                    shares * is_token.to(shares.device),
                    heads.keep(scores),
                    heads.keep(entries),
                    first is None,
                )
            )
        return tuple(findings)

    def _tell(
        self, layer: int, findings: Sequence[tuple[slice, tuple[Finding, ...]]], gates: Tensor
    ) -> None:
        """Report what was retrieved, from the first column of the call to the last."""
        for span, found in findings:
            for listener in self.mode.listeners:
                listener(layer, found, gates[:, :, span])

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
        if self._queries:
            self.text.keep_queries(self._queries, self.valid[:, -LAST:])
        if self.settings.finds_passages:
            ids = torch.full(self.valid.shape, -1) if self.ids is None else self.ids.cpu().long()
            self.text.pieces.append((ids, self.valid))
        self.text.is_broken = False
