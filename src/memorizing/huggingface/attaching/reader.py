"""Calls of a model that reads passages: when they are looked for, and put in front of a text."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from memorizing.huggingface.attaching.call_inputs import CallInputs
from memorizing.huggingface.attaching.calls import Calls
from memorizing.huggingface.attaching.finding import Shelf, find_passages
from memorizing.huggingface.attaching.kept_passages import find_read, put_entries
from memorizing.huggingface.attaching.memory_settings import MemorySettings
from memorizing.huggingface.attaching.passage_room import (
    Passage,
    Room,
    collect_own,
    list_special_ids,
    look_up_start_token,
    plan_room,
)
from memorizing.huggingface.attaching.passages import CHUNK_LEN, LAST
from memorizing.huggingface.attaching.step import CallMode, EntriesRead, Finding, Step
from memorizing.huggingface.attaching.window_cache import TextState


class Reader(Calls):
    """Calls that find passages at the start of every call of several tokens, and now and then.

    A call of several tokens is made twice: as far as the layers that find, to know what its last
    tokens ask for; then whole, with what they found in front of it. What is written after it asks
    on its way, and passages are exchanged when what it asks for is in sight no more.
    """

    def _find_passages(
        self, step: Step, cache: DynamicCache, given: CallInputs, kwargs: dict[str, Any]
    ) -> None:
        """Find passages where it is time to, and put them in front of the text. In place."""
        text, settings, mode = step.text, self.settings, step.mode
        if mode.asked is not None:
            return
        is_due = given.num_tokens > 1 or given.start >= text.next_search
        if is_due or self._positions.begins_zone(given.start):
            self._move_room(text, given)
        if not is_due:
            return
        if self._positions.is_learned and given.start and not text.room_len:
            return  # positions that were added cannot be moved
        text.next_search = given.num_columns - 1 + settings.search_every
        # Weights that are trained make something else of the same passages at every call.
        last = None if step.needs_graph else text.room
        before = [()] * given.num_rows if last is None else [*last.passages]
        if mode.passages is not None:
            kept = [mode.passages] * given.num_rows
        else:
            found = self._look_up(step, cache, given, kwargs)
            if found is None:
                return
            kept = [
                _exchange(old, new, settings, is_written=step.is_written)
                for old, new in zip(before, found, strict=True)
            ]
        _tell_passages(mode, given.start, kept)
        if last is None or kept != before:
            start_token = look_up_start_token(self.decoder.base.config)
            text.room = self._read_room(plan_room(kept, start_token), last)
            self._move_room(text, given)

    def _look_up(
        self, step: Step, cache: DynamicCache, given: CallInputs, kwargs: dict[str, Any]
    ) -> list[tuple[Passage, ...]] | None:
        """The best passages of every row now; None where nothing was read that asks for any."""
        text, mode = step.text, step.mode
        queries, valid = text.queries, text.queries_valid
        is_new = given.num_tokens > 1 or not queries
        ids = [text.list_ids(row) for row in range(given.num_rows)]
        if mode.looks_ahead and is_new and not step.needs_graph:
            asking = cache if given.start else self.make_cache()
            queries = self.ask(**{**kwargs, **self.pass_cache(asking)})
            valid = step.valid[:, -LAST:]
            if step.ids is not None:
                ids = [
                    torch.cat([before, given_ids[is_there].cpu().long()])
                    for before, given_ids, is_there in zip(ids, step.ids, step.valid, strict=True)
                ]
        return None if not queries or valid is None else self._choose(step, queries, valid, ids)

    def ask(self, **arguments: Any) -> dict[int, Tensor]:
        """What the last tokens of a call ask for, which is made as far as the layers that find.

        Args:
            arguments: of the base model, with a cache.

        Returns:
            Per layer that finds, its last queries (B, P, T, D), as `sum_chunks` takes a row's.
        """
        asked: dict[int, Tensor] = {}
        with self._make_apart(asked=asked), suppress(EntriesRead):
            self.decoder.base(**arguments)
        return asked

    def _choose(
        self,
        step: Step,
        queries: Mapping[int, Tensor],
        valid: Tensor,
        ids: Sequence[Tensor],
    ) -> list[tuple[Passage, ...]]:
        """The best passages of every row, whose texts so far are `ids`."""
        settings, control = self.settings, step.mode.control
        opened = self.opened
        assert opened is not None
        base = opened.searched
        places = {layer: step.text.open_heads[layer].places for layer in queries}
        special_ids = list_special_ids(self.decoder.base.config)
        special_ids += () if opened.library is None else opened.library.special_ids
        found = []
        for row in range(len(valid)):
            donor = row
            if control is not None and control.donor_rows is not None:
                # What another text asks for is what is wrong, also among the documents of all.
                donor = int(control.donor_rows[row])
            end = int(step.history.position[donor]) - settings.window + 1
            own = collect_own(
                step.history.memories, donor, ids[donor], special_ids, settings.num_sinks, end
            )
            asking = valid[donor]
            asked = {
                layer: tensor[donor][:, asking.to(tensor.device)]
                for layer, tensor in queries.items()
            }
            mine = Shelf(own.collection, own)
            is_any = bool(asking.any()) and not (base.is_empty and mine.is_empty)
            found.append(
                find_passages(
                    asked,
                    places,
                    ids[donor],
                    [base, mine],
                    settings,
                    is_written=step.is_written,
                )
                if is_any
                else ()
            )
        if control is not None and control.shuffle_values:
            found = [tuple(_shuffle(one, control.seed) for one in row) for row in found]
        return found

    def _find_end(self, text: TextState, given: CallInputs) -> tuple[Tensor, Tensor]:
        """`before` of a room in a call (see `Room`), and the position (B or 1, 1) of this token."""
        if self._positions.is_learned:  # places in the text are taken
            return torch.zeros(1, dtype=torch.int64), torch.tensor([[self.settings.room_len]])
        first_valid = torch.zeros(1, dtype=torch.int64)
        first_valid = first_valid if given.first_valid is None else given.first_valid.cpu()
        before = (given.start - self.window + 1 - first_valid).clamp(min=0)
        room_len = 0 if text.room_len else self.settings.room_len
        return before, self._positions.find_position(before, given.start, text.shift, room_len)

    def _move_room(self, text: TextState, given: CallInputs) -> None:
        """Let the room stand where this call begins to see its text. In place."""
        room = text.room
        if room is None:
            return
        before, end = self._find_end(text, given)
        layers = self._turn(room.read, self.settings.room_len - end)
        text.room = replace(room, before=before, layers=layers)

    def _turn(
        self, layers: Sequence[tuple[Tensor, Tensor]], distance: Tensor
    ) -> tuple[tuple[Tensor, Tensor], ...]:
        """Keys and values (B, H, n, D) so many positions (B or 1, n or 1) earlier."""
        if not bool(distance.any()):
            return tuple(layers)
        with torch.inference_mode(False), torch.no_grad():
            return tuple(
                (self.decoder.rotate_back(number, keys, distance), values)
                if self.decoder.rotated[number]
                else (keys, values)
                for number, (keys, values) in enumerate(layers)
            )

    def _read_room(self, room: Room | None, before: Room | None) -> Room | None:
        """The room with what all layers make of its tokens; what stood there stays as it is."""
        if room is None:
            return None
        if self.settings.keep == "entries":
            columns, mask = find_read(room)
            read = self._read_plainly(room.ids.gather(1, columns), mask)
            with torch.inference_mode(False), torch.no_grad():
                return put_entries(room, read, columns, self.decoder, self.settings.room_len)
        mask = torch.arange(room.length) >= room.first.view(-1, 1)
        held = () if before is None else self._take_same(room, before)
        return replace(room, read=self._read_plainly(room.ids, mask, held))

    def _take_same(self, room: Room, before: Room) -> tuple[tuple[Tensor, Tensor], ...]:
        """Per layer, keys and values (B, H, m, D) of the first m tokens, which stood there."""
        columns = room.find_same(before)
        distance = columns - before.length - torch.arange(columns.shape[1]) + room.length
        if self._positions.is_learned:  # what was added to them stays
            num_same = int((distance == 0).all(0).long().cumprod(0).sum())
            columns, distance = columns[:, :num_same], distance[:, :num_same]
        if not columns.shape[1]:
            return ()
        rows = torch.arange(len(columns)).unsqueeze(1)
        held = [
            (keys[rows, :, columns].transpose(1, 2), values[rows, :, columns].transpose(1, 2))
            for keys, values in before.read
        ]
        return self._turn(held, distance)

    def _read_plainly(
        self, ids: Tensor, mask: Tensor, held: Sequence[tuple[Tensor, Tensor]] = ()
    ) -> tuple[tuple[Tensor, Tensor], ...]:
        """What all layers make of tokens (B, n) at the last places of the room.

        Args:
            ids: of the tokens.
            mask: (B, n) bool, which of them are there.
            held: per layer, keys and values (B, H, m, D) of the first ones, which are not read.
        """
        base, length = self.decoder.base, ids.shape[1]
        device = base.get_input_embeddings().weight.device
        place = torch.arange(length) + self.settings.room_len - length
        cache, num_held = DynamicCache(), 0
        for number, (keys, values) in enumerate(held):
            cache.update(keys, values, number)
            num_held = keys.shape[2]
        arguments = {
            "input_ids": ids[:, num_held:].clamp(min=0).to(device),
            "position_ids": place[num_held:].expand(len(ids), -1).to(device),
            "attention_mask": None if bool(mask.all()) else mask.long().to(device),
        }
        with self._make_apart(is_plain=True):
            base(**arguments, **self.pass_cache(cache))
        layers: list[Any] = cache.layers
        return tuple((layer.keys, layer.values) for layer in layers)


def _exchange(
    old: tuple[Passage, ...],
    new: tuple[Passage, ...],
    settings: MemorySettings,
    *,
    is_written: bool,
) -> tuple[Passage, ...]:
    """What shall be in sight: the old ones, if they show what is best now."""
    if not new or any(one.shows(new[0]) for one in old):
        return old
    if not old or not is_written:
        return (*new[:1] * settings.num_again, *new)
    # The best one need not stand there twice: what is written on its way has said it once.
    new = tuple(one for one in new if not any(held.shows(one) for held in old))
    others = (one for one in dict.fromkeys(old) if not any(map(one.overlaps, new)))
    return (*new, *others)[: settings.num_passages]


def _tell_passages(mode: CallMode, since: int, passages: Sequence[tuple[Passage, ...]]) -> None:
    """Report all that is in sight: the shares of passages, on their chunks' entries."""
    if not mode.listeners:
        return
    findings = []
    for one in itertools.chain.from_iterable(map(dict.fromkeys, passages)):
        is_own = one.entries is None
        entries = torch.tensor(one.entries or range(one.chunk, one.chunk + CHUNK_LEN))
        shares = torch.full((1, 1, 1, len(entries)), one.score / len(entries))
        entries = entries.view(1, 1, 1, -1)
        findings.append(Finding(shares, shares, entries, is_own, one, since))
    for listener in mode.listeners:
        listener(0, findings, torch.ones(1, 1, 1))


def _shuffle(passage: Passage, seed: int) -> Passage:
    order = torch.randperm(len(passage.ids), generator=torch.Generator().manual_seed(seed))
    kept = passage.kept

    def mix_up() -> list[tuple[int, tuple[Tensor, Tensor]]]:
        return [(layer, (k[:, order], v[:, order])) for layer, (k, v) in kept()] if kept else []

    return replace(passage, ids=passage.ids[order], kept=mix_up if kept else None)
