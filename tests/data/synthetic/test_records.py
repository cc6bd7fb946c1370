import numpy as np
import pytest
import torch

from memorizing.data.synthetic.batch import (
    FILLER,
    FIRST_SYMBOL,
    QUESTION,
    RECORD,
    VALUE,
    VOCAB_SIZE,
)
from memorizing.data.synthetic.records import (
    COLON,
    COMMA,
    FIRST_RECALL_VALUE,
    NUM_KEYS,
    QUOTE,
    compute_document_len,
    count_questions,
    make_look_up_batch,
    make_pairs_batch,
    make_recall_batch,
    make_strings_batch,
)


def read_records(tokens: torch.Tensor, marker: int) -> list[tuple[tuple[int, ...], ...]]:
    """(key, value) of every record in a block, after the form of each was checked."""
    records = tokens[: len(tokens) // 10 * 10].view(-1, 10)
    records = records[records[:, 0] != FILLER]
    assert (records[:, 0] == marker).all()
    assert (records[:, 5] == VALUE).all()
    symbols = torch.cat([records[:, 1:5], records[:, 6:]], 1)
    assert int(symbols.min()) >= FIRST_SYMBOL
    assert int(symbols.max()) < VOCAB_SIZE
    return [(tuple(r[1:5]), tuple(r[6:])) for r in records.tolist()]


def test_one_record_and_two_questions_are_what_one_writes_by_hand():
    # One record, and 2 questions that fit a block of 23: both ask for the only key there is.
    batch = make_look_up_batch([5], num_records=1, block_len=23)
    (target,) = batch.targets.tolist()
    key, value = target[1:5], target[6:10]
    record = [RECORD, *key, VALUE, *value]
    question = [QUESTION, *key, VALUE, *value]
    assert target == record + [FILLER] * 13 + question + question + [FILLER] * 3
    assert batch.tokens.tolist() == [[FILLER, *target[:-1]]]
    answers = [23 + 6, 23 + 7, 23 + 8, 23 + 9, 33 + 6, 33 + 7, 33 + 8, 33 + 9]
    assert batch.valid.nonzero()[:, 1].tolist() == answers
    assert batch.is_first.tolist() == [[True, False]]


def test_the_training_documents_have_256_tokens_of_records_and_256_of_questions():
    batch = make_look_up_batch(range(3), num_records=25)
    assert batch.targets.shape == (3, 512)
    assert count_questions() == 25
    assert batch.valid.sum(1).tolist() == [100, 100, 100]
    assert not batch.valid[:, :256].any()
    for document in batch.targets:
        assert document[250:256].tolist() == document[506:].tolist() == [FILLER] * 6
        assert len(read_records(document[:256], RECORD)) == 25
        assert len(read_records(document[256:], QUESTION)) == 25


@pytest.mark.parametrize("num_records", [1, 24, 25, 26, 577])
def test_every_question_has_the_answer_of_a_record_of_its_document(num_records: int):
    batch = make_look_up_batch([11, 13], num_records)
    assert batch.targets.shape == (2, compute_document_len(num_records))
    for document, is_first in zip(batch.targets, batch.is_first, strict=True):
        blocks = document[:-256].split(256)
        records = [record for block in blocks for record in read_records(block, RECORD)]
        assert len(records) == num_records
        answers = dict(records)
        assert len(answers) == num_records, "a key stands twice"
        seen = set()
        for (key, value), first in zip(
            read_records(document[-256:], QUESTION), is_first.tolist(), strict=True
        ):
            assert answers[key] == value
            assert first == (key not in seen)
            seen.add(key)


def test_answers_come_out_by_question():
    batch = make_look_up_batch(range(2), num_records=7, block_len=37)
    by_question = batch.targets[batch.valid].view(2, 3, 4).tolist()
    for document, values in zip(batch.targets, by_question, strict=True):
        asked = [value for _, value in read_records(document[-37:], QUESTION)]
        assert [tuple(value) for value in values] == asked


def test_a_document_depends_on_its_seed_alone():
    together = make_look_up_batch([17, 19], num_records=31)
    alone = make_look_up_batch([19], num_records=31)
    assert torch.equal(together.targets[1:], alone.targets)
    assert not torch.equal(together.targets[0], together.targets[1])


def test_segments_put_together_are_the_documents():
    batch = make_look_up_batch(range(2), num_records=50)
    segments = list(batch.iterate_segments(256))
    assert len(segments) == 3
    for name in ("tokens", "targets", "valid"):
        whole = torch.cat([getattr(segment, name) for segment in segments], 1)
        assert torch.equal(whole, getattr(batch, name))
    assert not segments[1].valid.any()


@pytest.mark.parametrize(
    ("seeds", "num_records", "block_len"),
    [([], 1, 256), ([0], 0, 256), ([0], NUM_KEYS + 1, 256), ([0], 1, 9)],
)
def test_a_document_that_cannot_be_is_refused(seeds: list[int], num_records: int, block_len: int):
    with pytest.raises(ValueError, match=f"num_records {num_records}"):
        make_look_up_batch(seeds, num_records, block_len)


def find_records(document: list[int], length: int, marker: int = RECORD) -> list[list[int]]:
    """What stands from each marker on."""
    places = [i for i, token in enumerate(document) if token == marker]
    return [document[place : place + length] for place in places]


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


def test_the_value_of_a_key_stands_right_after_it_and_nowhere_else_after_a_key():
    batch = make_recall_batch([7], 3, 41, num_pairs=53, num_questions=11, num_repeats=2)
    (document,) = batch.targets.tolist()
    values = {}
    for block in (document[i : i + 41] for i in (0, 41, 82)):
        for place, token in enumerate(block):
            if token < FIRST_RECALL_VALUE:
                assert token not in values
                values[token] = block[place + 1]  # in the same block
    assert len(values) == 53
    assert min(values.values()) >= FIRST_RECALL_VALUE
    questions = document[123:]
    assert [values[key] for key in questions[::2]] == questions[1::2]
    assert batch.targets[batch.valid].tolist() == questions[1::2]
    assert len(set(questions[::2])) == 11 == batch.is_first.sum()
    # Where there is no room for anything else, all is pairs.
    full = make_recall_batch([7], 2, 6, num_pairs=6, num_questions=1).targets[0, :12]
    assert (full[::2] < FIRST_RECALL_VALUE).all()


def test_keys_that_are_alike_differ_in_one_symbol_and_are_all_different():
    batch = make_look_up_batch([19], num_records=14, block_len=83, num_alike=7)
    keys = np.array([r[1:5] for r in find_records(batch.targets[0].tolist(), 10)])
    assert len(np.unique(keys, axis=0)) == 14
    distances = (keys[:, None] != keys[None]).sum(-1)
    # Each has the six others of its family at distance 1.
    assert ((distances == 1).sum(1) >= 6).all()
