"""Which of what was read was retrieved, by document."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from memorizing.huggingface import open_memory
from memorizing.huggingface.sessions.sources import _join_spans, find_lines
from tests.huggingface.sessions.tools import (
    DOCUMENTS,
    NUM_ENTRIES,
    QUESTION,
    ask,
    read_all,
)
from tests.huggingface.tools import (
    SEGMENT_LEN,
    call,
    find_model,
    give_memory,
    make_tokens,
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


def test_passages_are_quotes_with_their_lines_and_when_they_were_in_sight(path: Path | None):
    model = find_model()
    give_memory(model, read="passages", num_passages=1, passage_len=48, search_every=3)
    words = {
        name: [f"w{token}" for token in make_tokens(1, 207, seed=seed)[0].tolist()]
        for seed, name in enumerate("ab")
    }
    # Lines of three words that end in three ways.
    lines = {
        name: "".join(
            word + ("\r\n", "\n", "\r")[place // 3 % 3] * (place % 3 == 2) + " é" * (place == 2)
            for place, word in enumerate(f" {one}" for one in text)
        )
        for name, text in words.items()
    }
    with open_memory(model, path) as memory, torch.no_grad():
        read_all(memory, lines)
        with memory.record() as sources:
            cache = memory.new_cache()
            first, second = make_tokens(1, 207, seed=0), make_tokens(1, 207, seed=1)
            call(model, second[:, 8:25], cache)
            for token in torch.cat([first[0, 64:112], second[0, 128:176]]):
                call(model, token.view(1, 1), cache)
    own = [one for one in sources.passages if one.document is None]
    read = [one for one in sources.passages if one.document is not None]
    assert read
    assert {one.first_line for one in own} <= {None}
    assert sources.passages[0].since == 0
    assert len(sources.passages) > 2
    changes = [one.since for one in sources.passages[1:]]
    # There is place for one.
    assert [one.until for one in sources.passages] == [*changes, None]
    assert changes == sorted(set(changes))
    for one in read:
        assert one.document is not None
        assert one.text in lines[one.document]
        numbered = lines[one.document].replace("\r\n", "\n").replace("\r", "\n").split("\n")
        first, last = one.text.split()[0], one.text.split()[-1]
        assert one.first_line is not None
        assert one.last_line is not None
        assert first in numbered[one.first_line - 1].split()
        assert last in numbered[one.last_line - 1].split()
        assert 0 < one.weight <= 1
        begin, end = one.focus
        assert 0 <= begin < end <= len(one.text)


def test_places_are_the_most_used_entries_with_their_lines(path: Path | None):
    model = find_model()
    give_memory(model)
    lines = {name: "\n".join(text.split()) for name, text in DOCUMENTS.items()}
    with open_memory(model, path, keep_text=True) as memory:
        read_all(memory, lines)
        with memory.record() as sources:
            ask(model)
    places = sources.find_places(num_documents=2, num_per_document=3, num_characters=7)
    assert len({place.document for place in places}) == 2
    assert [place.weight for place in places] == sorted((p.weight for p in places), reverse=True)
    for place in places:
        assert place.document is not None
        assert place.first_line is not None
        token = place.text[slice(*place.focus)]
        assert lines[place.document].split()[place.first_line - 1] == token
        assert place.last_line == place.first_line
        assert place.text in lines[place.document]
        assert len(place.text) <= 14 + len(token)
    assert sources.passages == []


@pytest.mark.parametrize(
    ("text", "start", "end", "lines"),
    [
        ("", 0, 0, (1, 1)),
        ("one", 0, 3, (1, 1)),
        ("a\nb\n", 0, 4, (1, 2)),
        ("a\nb\nc", 1, 5, (2, 3)),
        ("a\r\nb\r\nc", 3, 4, (2, 2)),
        ("a\r\nb\r\nc", 2, 6, (2, 2)),
        ("a\rb\rc", 2, 5, (2, 3)),
        ("\n\n\n", 1, 3, (2, 3)),
        ("a\u2028b\x0cc\n", 4, 5, (1, 1)),
        ("é\n数\n👩\u200d🔬", 4, 7, (3, 3)),
    ],
)
def test_lines_are_counted_as_editors_do(text, start, end, lines):
    assert find_lines(text, start, end) == lines


def test_what_another_wrote_as_characters_of_tokens_is_no_crash():
    spans = torch.tensor([[-5, 2], [2**31 - 1, 2**31 - 1], [3, 1], [4, 2**31 - 1]])
    assert _join_spans(spans, "seven77") == (0, 7)
    assert _join_spans(spans[1:3], "seven77") == (0, 0)
    assert _join_spans(spans[:0], "") == (0, 0)
