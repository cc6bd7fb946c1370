"""Texts of which only the tokens are known are found by words alone, by what finds in memories."""

from __future__ import annotations

import math

import pytest
import torch

from memorizing.huggingface.attaching.finding import Stretch, TextShelf, find_passages
from memorizing.huggingface.attaching.memory_settings import MemorySettings
from tests.huggingface.attaching.chunks import choose_spans, match, rank_chunks

SETTINGS = MemorySettings((0,), num_passages=3, passage_len=41, passage_margin=13.0)
LENGTHS = (211, 1, 83, 307)
STARTS = (0, 5, 101, 13)


def make_shelf(num_words: int) -> TextShelf:
    ids = torch.randint(num_words, (sum(LENGTHS),), generator=torch.Generator().manual_seed(0))
    parts = zip("abca", STARTS, ids.split(LENGTHS), strict=True)
    return TextShelf([Stretch(*part) for part in parts])


@pytest.mark.parametrize("num_words", [7, 53, 997])
def test_what_words_alone_find_is_what_bm25_ranks_first(num_words: int):
    shelf = make_shelf(num_words)
    asked = shelf.stretches[3].ids[131:160]
    found = find_passages({}, {}, asked, [shelf], SETTINGS)
    part = shelf.collection
    matches = match(asked, [part])
    nothing = torch.zeros(1, len(part.first_of_chunk))
    scores = rank_chunks([nothing], matches)
    spans = choose_spans([part], [nothing], scores, 3, 41, SETTINGS.passage_margin)
    assert [torch.cat([one.ids for one in shelf.stretches])[s.start : s.end] for s in spans]
    assert len(found) == len(spans) >= 1
    for passage, span in zip(found, spans, strict=True):
        stretch = shelf.stretches[span.document]
        start = span.start - sum(LENGTHS[: span.document]) + STARTS[span.document]
        assert (passage.document, passage.start) == (stretch.document, start)
        assert passage.end - passage.start == span.end - span.start == len(passage.ids)
        first = passage.start - stretch.start
        assert torch.equal(passage.ids, stretch.ids[first : first + len(passage.ids)])
        assert passage.start <= passage.chunk < passage.end
        assert math.isfinite(passage.score)
    assert found[0].document == "a"
    assert STARTS[3] <= found[0].start <= STARTS[3] + 131 < found[0].end


def test_an_end_of_a_stretch_is_told_and_nothing_is_found_by_words_that_nobody_has():
    shelf = make_shelf(997)
    last, *_ = find_passages({}, {}, shelf.stretches[2].ids[-15:], [shelf], SETTINGS)
    assert (last.document, last.end, last.is_at_end) == ("c", 101 + 83, True)
    first, *_ = find_passages({}, {}, shelf.stretches[2].ids[:15], [shelf], SETTINGS)
    assert (first.start, first.is_at_end) == (101, False)
    assert find_passages({}, {}, torch.tensor([998, 999]), [shelf], SETTINGS) == ()


def test_shelves_that_are_searched_together_find_as_one():
    shelf = make_shelf(53)
    parts = [TextShelf(shelf.stretches[:2]), TextShelf(shelf.stretches[2:])]
    asked = shelf.stretches[0].ids[60:90]
    together = find_passages({}, {}, asked, parts, SETTINGS)
    assert together == find_passages({}, {}, asked, [shelf], SETTINGS)
    assert not any(part.is_empty for part in parts)
    assert TextShelf([]).is_empty
