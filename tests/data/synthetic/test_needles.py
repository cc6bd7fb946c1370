"""Needles in filler, and chains of variables."""

import pytest

from memorizing.data.synthetic.batch import (
    QUESTION,
    VALUE,
)
from memorizing.data.synthetic.needles import (
    FIRST_WORD,
    make_needles_batch,
    make_tracking_batch,
)
from tests.data.synthetic.test_records import find_records


@pytest.mark.parametrize("num_needles", [1, 18])
def test_each_needle_stands_once_at_its_depth_and_is_asked_by_its_name(num_needles: int):
    num_questions = min(num_needles, 4)
    batch = make_needles_batch([11], 2, 83, num_needles=num_needles, num_questions=num_questions)
    (document,) = batch.targets.tolist()
    needles = find_records(document, 9)
    assert len(needles) == num_needles
    by_name = {tuple(needle[1:3]): needle for needle in needles}
    assert len(by_name) == num_needles
    questions = find_records(document, 9, QUESTION)
    assert len(questions) == num_questions
    for question, depth in zip(questions, batch.group[0].tolist(), strict=True):
        needle = by_name[tuple(question[1:3])]
        assert question[3:] == needle[3:]
        assert needle[3] == VALUE
        place = next(i for i in range(166) if document[i : i + 9] == needle)
        slot = place // 83 * 9 + place % 83 // 9
        assert place % 83 % 9 == 0
        assert depth == slot * 5 // 18


def test_filler_differs_by_place_and_document_and_has_numbers_of_its_own():
    batch = make_needles_batch([1, 2], 6, 127)
    text = batch.targets[:, : 6 * 127].view(2, 6, 127)
    lines = {tuple(block.tolist()) for block in text.flatten(0, 1)}
    assert len(lines) == 12
    digits = (text >= 4) & (text < FIRST_WORD)
    assert int(digits.sum()) > 2 * 5, "no digits but the needles'"
    # A grammar of four successors a word: far fewer pairs than there could be.
    words = text[0][~digits[0]].tolist()
    pairs = set(zip(words, words[1:], strict=False))
    assert len(pairs) < len(words) / 2


@pytest.mark.parametrize("num_hops", [0, 1, 3])
def test_a_question_about_a_variable_is_answered_by_its_whole_chain(num_hops: int):
    batch = make_tracking_batch([13], 3, 83, num_chains=2, num_hops=num_hops)
    (document,) = batch.targets.tolist()
    statements = find_records(document, 6)
    value_of = {tuple(s[1:3]): tuple(s[4:6]) for s in statements}
    assert len(value_of) == len(statements) == 2 * (num_hops + 1)
    length = 1 + 3 * (num_hops + 2) - 1
    for question in find_records(document, length, QUESTION):
        names = [tuple(question[i : i + 2]) for i in range(1, length, 3)]
        assert question[3::3] == [VALUE] * (num_hops + 1)
        for name, value in zip(names[:-1], names[1:], strict=True):
            assert value_of[name] == value
        assert all(token < FIRST_WORD for token in names[-1])
    assert batch.valid.sum() == 2 * (length - 4)
