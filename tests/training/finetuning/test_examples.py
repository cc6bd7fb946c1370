"""What is drawn where passages are read: what stands before a text, and what never does."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch

from memorizing.data import TokenizedDocument
from memorizing.huggingface.attaching.memory_settings import MemorySettings
from memorizing.training.finetuning import examples
from memorizing.training.finetuning.examples import KINDS, Example, Examples
from memorizing.training.finetuning.passage_rows import draw_in_turn

START = 5
LEN = 37
"""Of a passage."""
SETTINGS = MemorySettings((0,), passage_len=LEN, window=211, segment_len=211)


def make_documents(*lengths: int, num_words: int) -> list[TokenizedDocument]:
    """Documents of words that begin at 7, each equally often."""
    order = np.random.default_rng(0).permutation(sum(lengths)) % num_words + 7
    parts = np.split(order.astype(np.uint16), np.cumsum(lengths)[:-1])
    return [TokenizedDocument(f"d{n}", part, len(part)) for n, part in enumerate(parts)]


def make_unique(*lengths: int) -> list[TokenizedDocument]:
    """Documents in which no word comes twice."""
    return make_documents(*lengths, num_words=sum(lengths))


def find(documents: list[TokenizedDocument], part: list[int]) -> tuple[int, int]:
    """The document that has a part, and where it begins."""
    (place,) = [
        (number, start)
        for number, document in enumerate(documents)
        for start in np.flatnonzero(document.tokens == part[0]).tolist()
        if document.tokens[start : start + len(part)].tolist() == part
    ]
    return place


def list_passages(example: Example) -> list[list[int]]:
    """Passages of an example, first to last."""
    start, *pasted = example.before.tolist()
    assert start == START
    assert len(pasted) % LEN == 0
    return [pasted[n : n + LEN] for n in range(0, len(pasted), LEN)]


def test_passages_have_the_text_or_nothing_near_it_and_the_best_one_stands_last_and_twice():
    documents = make_unique(1009, 887)
    drawer = Examples(documents, SETTINGS, START)
    for number in range(19):
        quoted, other, alone = (drawer.draw(kind, f"{number}") for kind in KINDS)
        assert quoted.text.tolist() == other.text.tolist() == alone.text.tolist()
        assert 64 <= len(quoted.text) <= 128
        place = find(documents, quoted.text.tolist())
        assert place == (quoted.document, quoted.start)
        assert alone.before.tolist() == [START]
        # All but the text itself is found by nothing.
        assert other.before.tolist() == [START]
        *_, again, best = list_passages(quoted)
        assert again == best
        document, start = find(documents, best)
        assert document == place[0]
        # It begins a quarter before a chunk of 32 that, with the next, has words of the first 48.
        assert place[1] - 64 - LEN // 4 <= start < place[1] + examples.PROMPT_LEN


def list_places(documents: list[TokenizedDocument], example: Example) -> Iterator[tuple[int, int]]:
    """Documents and tokens that stand before an example, but for the edges of passages."""
    joined = np.concatenate([document.tokens for document in documents])
    edges = np.cumsum([0, *(len(document.tokens) for document in documents)])
    for part in example.before[1:].unfold(0, 5, 1).numpy() if len(example.before) > 5 else ():
        windows = np.lib.stride_tricks.sliding_window_view(joined, 5)
        for place in np.flatnonzero((windows == part).all(1)).tolist():
            number = int(np.searchsorted(edges, place, side="right")) - 1
            yield from ((number, place - int(edges[number]) + n) for n in range(5))


@pytest.mark.parametrize("lengths", [(1999,), (701, 599, 13, 307), (211, 47)])
def test_passages_that_are_other_have_nothing_within_a_passage_of_the_text(lengths: tuple[int]):
    documents = make_documents(*lengths, num_words=89)
    drawer = Examples(documents, SETTINGS, START)
    counts, found_in, nearest = set(), set(), 10**6
    for number in range(53):
        example = drawer.draw("other", f"{number}")
        if len(lengths) == 1:
            passages = list_passages(example)
            assert passages[-1] == passages[-2]
            assert len(set(map(tuple, passages))) == len(passages) - 1
            counts.add(len(passages) - 1)
        for document, place in list_places(documents, example):
            found_in.add(document == example.document)
            if document == example.document:
                after = place - (example.start + len(example.text)) + 1
                nearest = min(nearest, max(example.start - place, after))
    assert nearest == LEN + 1 if len(lengths) > 1 else nearest > LEN
    assert counts == ({1, 2, 3, 4} if len(lengths) == 1 else set())
    assert found_in == ({True} if len(lengths) == 1 else {True, False})


@pytest.mark.parametrize(
    ("lengths", "window", "text_lens"),
    [((1,), 211, {1}), ((2, 3), 211, {2, 3}), ((53,), 211, {53}), ((997,), 41, {41})],
)
def test_texts_are_no_longer_than_their_document_and_the_window(
    lengths: tuple[int], window: int, text_lens: set[int]
):
    settings = MemorySettings((0,), passage_len=LEN, window=window, segment_len=window)
    drawer = Examples(make_unique(*lengths), settings, START)
    for kind in KINDS:
        drawn = [drawer.draw(kind, f"{number}") for number in range(23)]
        assert {len(one.text) for one in drawn} == text_lens
        assert all((len(one.before) == 1) == (kind != "quoted") for one in drawn)


def test_documents_are_searched_with_their_neighbors_up_to_the_length_of_a_shelf(monkeypatch):
    monkeypatch.setattr(examples, "SHELF_LEN", 503)
    documents = make_documents(211, 199, 97, 1201, 101, num_words=61)
    drawer = Examples(documents, SETTINGS, START)
    expected = {0: {0, 1}, 1: {0, 1}, 2: {2}, 3: {3, 4}, 4: {3, 4}}
    seen: dict[int, set[int]] = {number: set() for number in expected}
    for number in range(307):
        example = drawer.draw(KINDS[number % 2], f"{number}")
        for document, place in list_places(documents, example):
            seen[example.document].add(document)
            if document == example.document:
                assert place // 503 == example.start // 503
    assert seen == expected


def test_how_many_passages_and_how_often_the_best_one_are_those_of_the_memory():
    documents = make_documents(1999, num_words=89)
    settings = MemorySettings(
        (0,), passage_len=LEN, num_passages=2, best_readings=3, passage_margin=99.0
    )
    drawer = Examples(documents, settings, START)
    counts = set()
    for number in range(19):
        passages = list_passages(drawer.draw("quoted", f"{number}"))
        assert passages[-1] == passages[-2] == passages[-3]
        counts.add(len(set(map(tuple, passages))))
    assert counts == {1, 2}


def test_held_out_texts_are_drawn_in_every_kind_until_so_many_tokens_are_read():
    drawer = Examples(make_documents(1999, num_words=89), SETTINGS, START)
    few = draw_in_turn(drawer, 1, "seed")
    assert len(few) == 3
    total = sum(len(one.before) + len(one.text) for one in few)
    assert len(draw_in_turn(drawer, total, "seed")) == 3
    more = draw_in_turn(drawer, total + 1, "seed")
    assert len(more) == 6
    texts = [one.text.tolist() for one in more]
    assert texts[0] == texts[1] == texts[2] == few[0].text.tolist()
    assert texts[3] == texts[4] == texts[5] != texts[0]
    assert torch.equal(more[0].before, few[0].before)
