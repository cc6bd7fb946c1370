"""The documents of pairs, needles, tracking and strings are what their tasks say."""

from collections.abc import Callable

import numpy as np
import pytest
import torch

from memorizing.data.synthetic.batch import (
    FILLER,
    QUESTION,
    RECORD,
    VALUE,
    VOCAB_SIZE,
    QuestionBatch,
)
from memorizing.data.synthetic.needles import (
    FIRST_WORD,
    NUM_NAMES,
    make_needles_batch,
    make_tracking_batch,
)
from memorizing.data.synthetic.records import (
    COLON,
    COMMA,
    QUOTE,
    make_look_up_batch,
    make_pairs_batch,
    make_strings_batch,
)

Maker = Callable[..., QuestionBatch]
MAKERS: list[tuple[Maker, dict[str, int], int]] = [
    (make_pairs_batch, {"num_questions": 5}, 2),
    (make_pairs_batch, {"num_questions": 5, "num_writes": 3}, 2),
    (make_needles_batch, {"num_needles": 7, "num_questions": 3}, 5),
    (make_tracking_batch, {"num_chains": 3, "num_hops": 2}, 8),
    (make_strings_batch, {"num_questions": 3}, 8),
]
"""With the number of answer tokens of a question."""


def find_records(document: list[int], length: int, marker: int = RECORD) -> list[list[int]]:
    """What stands from each marker on."""
    places = [i for i, token in enumerate(document) if token == marker]
    return [document[place : place + length] for place in places]


@pytest.mark.parametrize(("make", "sizes", "answer_len"), MAKERS)
def test_a_document_is_whole_blocks_and_questions_with_answers_of_one_length(
    make: Maker, sizes: dict[str, int], answer_len: int
):
    batch = make([3, 5], 2, 83, **sizes)
    assert not batch.valid[:, : 2 * 83].any()
    num_questions = batch.is_first.shape[1]
    assert batch.valid.sum(1).tolist() == [num_questions * answer_len] * 2
    assert batch.is_first.all()
    assert batch.tokens[:, 0].tolist() == [FILLER, FILLER]
    assert torch.equal(batch.tokens[:, 1:], batch.targets[:, :-1])
    assert 0 <= int(batch.targets.min()) <= int(batch.targets.max()) < VOCAB_SIZE
    alone = make([5], 2, 83, **sizes)
    assert torch.equal(alone.targets[0], batch.targets[1])
    assert not torch.equal(batch.targets[0], batch.targets[1])


@pytest.mark.parametrize("num_writes", [1, 2, 3])
def test_the_answer_about_a_key_is_what_was_written_last(num_writes: int):
    batch = make_pairs_batch([7], 3, 83, num_writes=num_writes, num_questions=5)
    (document,) = batch.targets.tolist()
    written: dict[tuple[int, ...], list[list[int]]] = {}
    for record in find_records(document, 7):
        assert record[4] == VALUE
        written.setdefault(tuple(record[1:4]), []).append(record[5:])
    # 11 records of 7 tokens fit a block of 83.
    assert len(written) == 33 // num_writes
    assert {len(values) for values in written.values()} == {num_writes}
    for values in written.values():
        assert len({value[0] for value in values}) == num_writes
    questions = find_records(document, 7, QUESTION)
    assert len({tuple(question[1:4]) for question in questions}) == 5
    for question in questions:
        assert question[5:] == written[tuple(question[1:4])][-1]
    assert batch.targets[batch.valid].view(5, 2).tolist() == [q[5:] for q in questions]


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


def test_strings_are_json_and_asked_for_by_the_same_characters():
    batch = make_strings_batch([17], 2, 71, num_questions=3)
    (document,) = batch.targets.tolist()
    spelling = dict(enumerate("0123456789abcdef", 4)) | {QUOTE: '"', COLON: ":", COMMA: ","}
    text = "".join(spelling.get(token, "") for token in document[:142])
    pairs = dict(pair.split(":") for pair in text.rstrip(",").split(","))
    assert len(pairs) == 6  # three pairs of 22 tokens in a block of 71
    for question in find_records(document, 22, QUESTION):
        key, value = "".join(spelling[token] for token in question[1:]).split(":")
        assert pairs[key] == value
    answers = batch.targets[batch.valid].view(3, 8)
    assert "".join(spelling[int(token)] for token in answers[0]) in text


def test_keys_that_are_alike_differ_in_one_symbol_and_are_all_different():
    batch = make_look_up_batch([19], num_records=14, block_len=83, num_alike=7)
    keys = np.array([r[1:5] for r in find_records(batch.targets[0].tolist(), 10)])
    assert len(np.unique(keys, axis=0)) == 14
    distances = (keys[:, None] != keys[None]).sum(-1)
    # Each has the six others of its family at distance 1.
    assert ((distances == 1).sum(1) >= 6).all()


@pytest.mark.parametrize(
    ("make", "num_blocks", "sizes"),
    [
        (make_pairs_batch, 0, {}),
        (make_pairs_batch, 1, {"num_questions": 12}),
        (make_pairs_batch, 1, {"num_questions": 1, "num_writes": 0}),
        (make_pairs_batch, 9, {"num_questions": 1, "num_writes": 61}),
        (make_needles_batch, 1, {"num_needles": 10}),
        (make_needles_batch, 1, {"num_needles": 1, "num_questions": 2}),
        (make_needles_batch, 999, {"num_needles": NUM_NAMES + 1}),
        (make_tracking_batch, 1, {"num_chains": 0}),
        (make_tracking_batch, 1, {"num_chains": 2, "num_hops": 6}),
        (make_strings_batch, 1, {"num_questions": 4}),
    ],
)
def test_a_document_that_cannot_be_is_refused(make: Maker, num_blocks: int, sizes: dict[str, int]):
    with pytest.raises(ValueError, match="there must be 1 seed or more"):
        make([0], num_blocks, 83, **sizes)
