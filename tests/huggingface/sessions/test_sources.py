"""Which of what was read was retrieved, by document."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from memorizing.huggingface import open_memory
from tests.huggingface.sessions.tools import (
    NUM_ENTRIES,
    QUESTION,
    ask,
    read_all,
)
from tests.huggingface.tools import (
    SEGMENT_LEN,
    find_model,
    give_memory,
    read,
)


@pytest.mark.parametrize("combine", ["joint", "gate"])
def test_sources_name_the_documents_that_were_retrieved(path: Path | None, combine: str):
    model = find_model()
    attachment = give_memory(model, combine=combine, num_neighbors=7)
    told = []
    with open_memory(model, path) as memory:
        read_all(memory)
        with memory.record() as sources, attachment.listen(lambda *args: told.append(args)):
            ask(model)
        assert not attachment.mode.listeners
    # All 41 tokens of 2 rows by 4 heads have memories to attend to.
    assert sum(sources.mass.values()) + sources.own_mass == pytest.approx(2 * 4 * 41, rel=1e-4)
    expected = dict.fromkeys(NUM_ENTRIES, 0.0)
    ends = torch.tensor(list(NUM_ENTRIES.values())).cumsum(0).tolist()
    for _, findings, gates in told:
        assert bool(((gates > 0) & (gates < 1)).all())
        for found in findings:
            numbers = found.entries.flatten().tolist()
            if found.is_own:
                assert all(0 <= number < 41 for number in numbers)
            else:
                for mass, number in zip(found.shares.flatten(), numbers, strict=True):
                    name = list(NUM_ENTRIES)[sum(number >= end for end in ends)]
                    expected[name] += float(mass)
    assert sources.mass == pytest.approx(expected, rel=1e-4)
    assert sources.own_mass > 0
    listed = sources.list()
    assert [name for name, _ in listed] == sorted(expected, key=lambda name: -expected[name])


def test_padding_is_no_source():
    model = find_model()
    give_memory(model)
    tokens = torch.cat([torch.zeros(1, 6, dtype=torch.int64), QUESTION[:1]], 1)
    mask = (tokens != 0).long()
    masses = []
    with open_memory(model) as memory:
        read_all(memory)
        for given, given_mask in ((tokens, mask), (QUESTION[:1], None)):
            with memory.record() as sources, torch.no_grad():
                read(model, given, SEGMENT_LEN, given_mask)
            masses.append(sources.mass)
    assert masses[0] == pytest.approx(masses[1], rel=1e-3)


def test_recordings_that_overlap_each_see_their_own_calls(path: Path | None):
    model = find_model()
    give_memory(model)
    with open_memory(model, path) as memory:
        read_all(memory)
        outer, inner = memory.record(), memory.record()
        first = outer.__enter__()
        ask(model)
        second = inner.__enter__()
        ask(model)
        outer.__exit__(None, None, None)
        ask(model)
        inner.__exit__(None, None, None)
        ask(model)
    assert first.mass == pytest.approx(second.mass, rel=1e-6)
    assert sum(first.mass.values()) + first.own_mass == pytest.approx(2 * 2 * 4 * 41, rel=1e-4)


def test_a_recording_goes_on_when_documents_are_forgotten_and_read(path: Path | None):
    model = find_model()
    give_memory(model)
    with open_memory(model, path) as memory:
        read_all(memory)
        with memory.record() as one:
            ask(model)
        memory.forget("first")
        read_all(memory, {"new": "w5 w6 w7 w8 w9 w10 w11"})
        with memory.record() as two:
            ask(model)
    with open_memory(model) as memory:
        read_all(memory)
        with memory.record() as sources:
            ask(model)
            memory.forget("first")
            read_all(memory, {"new": "w5 w6 w7 w8 w9 w10 w11"})
            ask(model)
    names = one.mass.keys() | two.mass.keys()
    expected = {name: one.mass.get(name, 0) + two.mass.get(name, 0) for name in names}
    assert sources.mass == pytest.approx(expected, rel=1e-6)
    assert {"first", "new"} <= sources.mass.keys()
