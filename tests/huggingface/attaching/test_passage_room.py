"""What stands in the room for passages, and what a text has behind its window to find."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from memorizing.huggingface.attaching.passage_room import (
    Passage,
    collect_own,
    list_special_ids,
    look_up_start_token,
    plan_room,
)
from memorizing.huggingface.attaching.passage_room import make_passage as build_passage
from memorizing.huggingface.attaching.passages import CHUNK_LEN, Span
from memorizing.memory import Memory

CAPACITY, WRITTEN, NUM_SINKS = 23, 37, 3
ALL = torch.ones(1, WRITTEN, dtype=torch.bool)


def make_passage(ids: list[int], document: str | None = "a", **values: int | bool) -> Passage:
    fields = {"start": 0, "end": len(ids), "score": 0.5, "chunk": 0, "is_at_end": False}
    return Passage(document, **fields | values, entries=None, ids=torch.tensor(ids))


def test_rows_end_together_each_behind_a_start_token_what_is_named_first_last():
    best, other = make_passage([7, 8]), make_passage([5])
    room = plan_room([(best, best, other), (), (make_passage([9]),)], 1)
    assert room is not None
    assert room.ids.tolist() == [[1, 5, 7, 8, 7, 8], [0] * 6, [0, 0, 0, 0, 1, 9]]
    assert room.first.tolist() == [0, 6, 4]
    assert room.length == 6


def test_without_a_start_token_passages_stand_alone_and_nothing_needs_no_room():
    room = plan_room([(make_passage([7, 8]),)], None)
    assert room is not None
    assert room.ids.tolist() == [[7, 8]]
    assert plan_room([(), ()], 1) is None


@pytest.mark.parametrize(
    ("start", "end", "is_at_end", "chunk", "is_shown"),
    [
        (10, 10 + 4 * CHUNK_LEN, False, 10 + CHUNK_LEN, True),
        (10, 9 + 4 * CHUNK_LEN, False, 10 + CHUNK_LEN, False),  # too little behind it
        (10, 9 + 4 * CHUNK_LEN, True, 10 + CHUNK_LEN, True),
        (10, 10 + 4 * CHUNK_LEN, False, 9, False),  # before it
    ],
)
def test_a_passage_shows_a_chunk_that_has_twice_as_much_behind_it(
    start: int, end: int, is_at_end: bool, chunk: int, is_shown: bool
):
    held = make_passage([3], start=start, end=end, is_at_end=is_at_end)
    wanted = make_passage([3], chunk=chunk)
    assert held.shows(wanted) is is_shown
    assert not held.shows(replace(wanted, document="b"))
    assert not held.shows(replace(wanted, document=None))


def make_memory() -> Memory:
    """A ring whose entry of token t is all t."""
    memory = Memory(1, 2, CAPACITY, 5, torch.float32, torch.device("cpu"))
    entries = torch.arange(WRITTEN).float().view(1, 1, -1, 1).expand(1, 2, -1, 5).contiguous()
    for span in (slice(0, 19), slice(19, WRITTEN)):
        memory.append(entries[:, :, span], entries[:, :, span] + 1, ALL[:, span])
    return memory


@pytest.mark.parametrize(("end", "expected"), [(30, 30), (99, WRITTEN), (15, 15), (9, None)])
def test_a_texts_own_entries_are_those_a_ring_still_has_in_the_order_of_tokens(end, expected):
    own = collect_own({1: make_memory()}, 0, torch.arange(50) + 100, (), NUM_SINKS, end)
    oldest = WRITTEN - CAPACITY
    if expected is None:
        assert own.collection.num_entries == ()
        return
    assert own.first == oldest
    assert own.collection.num_entries == (expected - oldest,)
    (block,) = own.collection.layers[1].blocks
    entries = block.load()
    assert entries.keys[0, 1, :, 2].tolist() == list(range(oldest, expected))
    assert entries.values[0, 0, :, 0].tolist() == list(range(oldest + 1, expected + 1))


def test_what_is_known_by_its_embedding_only_ends_what_is_found():
    ids = torch.arange(50)
    ids[20] = -1
    own = collect_own({1: make_memory()}, 0, ids, (), NUM_SINKS, 30)
    assert own.collection.num_entries == (20 - (WRITTEN - CAPACITY),)
    assert own.ids.tolist() == list(range(20))


def test_special_tokens_that_are_sinks_are_in_no_passage_and_words_are():
    memory = make_memory()
    for token in (21, 22, 25):
        memory.values[:, :, token % CAPACITY] *= 1e-3
    own = collect_own({1: memory}, 0, torch.arange(50), (22, 23), NUM_SINKS, 30)
    assert (own.first + own.collection.is_sink.nonzero().flatten()).tolist() == [21, 22, 25]
    there = [token for token in range(own.first, 30) if token != 22]
    passage = build_passage(Span(0, 0, 0, 30 - own.first, 0, 0.5), own.collection, own)
    assert passage.ids.tolist() == there
    assert (passage.start, passage.end) == (own.first, 30)
    assert own.collection.ids[own.collection.ids >= 0].tolist() == there


def test_sinks_of_unknown_tokens_are_left_out():
    part = collect_own({1: make_memory()}, 0, torch.arange(50), (), NUM_SINKS, 30).collection
    unknown = replace(part, read_ids=None, median=1e6)
    assert bool(unknown.is_left_out.all())
    assert not part.is_left_out.any()


def test_special_tokens_are_those_of_the_configuration():
    assert list_special_ids(SimpleNamespace()) == ()
    config = SimpleNamespace(bos_token_id=3, eos_token_id=[5, 7], pad_token_id=None)
    assert list_special_ids(config) == (3, 5, 7)
    assert list_special_ids(SimpleNamespace(pad_token_id=True)) == ()
    assert list_special_ids(None) == ()
    assert list_special_ids(SimpleNamespace(bos_token_id=3, all_special_ids=[0, 3])) == (0, 3)


def test_a_start_token_is_that_of_the_first_who_has_one():
    nothing, ends = SimpleNamespace(bos_token_id=None), SimpleNamespace(eos_token_id=[7, 8])
    both = SimpleNamespace(bos_token_id=3, eos_token_id=5)
    assert look_up_start_token(None, nothing, ends) == 7
    assert look_up_start_token(None, nothing, ends, both) == 3
    assert look_up_start_token(both, ends) == 3
    assert look_up_start_token(nothing, SimpleNamespace(bos_token_id=True)) is None
