"""Answering questions from a memory: chance, greedy decoding, controls, intervals, resumption."""

import dataclasses

import pytest
import torch

from memorizing.config import ModelConfig
from memorizing.data.synthetic.batch import NUM_SYMBOLS, VOCAB_SIZE, QuestionBatch
from memorizing.data.synthetic.needles import make_needles_batch
from memorizing.data.synthetic.records import make_pairs_batch
from memorizing.evaluation.answers import (
    answer_questions,
    compute_wilson_interval,
    read_blocks,
    split_questions,
)
from memorizing.model import MemorizingTransformer
from memorizing.training.questions import build_gathering_model

BLOCK_LEN = 37
CONFIG = ModelConfig(
    vocab_size=VOCAB_SIZE,
    num_layers=2,
    model_dim=24,
    num_heads=2,
    head_dim=12,
    ffn_dim=24,
    segment_len=BLOCK_LEN,
    window=BLOCK_LEN,
    xl_cache=False,
    memory_layers=(1,),
    capacity=3 * BLOCK_LEN,
    num_neighbors=5,
    smear_keys=True,
    induction_init=True,
)


def make_batch(seeds) -> QuestionBatch:
    return make_pairs_batch(seeds, 1, BLOCK_LEN, num_questions=3)


def test_an_untrained_model_answers_by_chance():
    model = build_gathering_model(CONFIG, seed=0)
    batch = make_pairs_batch(range(40), 1, BLOCK_LEN, num_questions=5)
    right = answer_questions(model, batch).is_right
    assert right.shape == (40, 5, 2)
    low, high = compute_wilson_interval(int(right.sum()), right.numel())
    # The induction start finds what a key was paired with, but does not know how to say it.
    assert low <= 2 / NUM_SYMBOLS
    assert high >= 0.5 / NUM_SYMBOLS


def test_questions_without_a_document_before_them_are_answered_from_nothing():
    model = build_gathering_model(CONFIG, seed=0)
    _, questions = split_questions(make_batch(range(4)), BLOCK_LEN)
    alone = answer_questions(model, questions)
    assert alone.is_right.shape == (4, 3, 2)
    off = answer_questions(model, questions, control="off")
    assert torch.equal(alone.is_right, off.is_right)


def test_a_whole_answer_is_right_exactly_if_greedy_decoding_gives_it():
    model = build_gathering_model(CONFIG, seed=1)
    batch = make_needles_batch([2], 2, BLOCK_LEN)
    blocks, questions = split_questions(batch, BLOCK_LEN)
    written = questions.tokens[:, :-4]  # up to <v>: five tokens of answer follow
    with torch.no_grad():
        start = read_blocks(model, blocks, model.init_state(1, 2 * BLOCK_LEN))
        for _ in range(5):
            logits = model(written, start).logits
            written = torch.cat([written, logits[:, -1:].argmax(-1)], 1)
    greedy = written[:, -5:]

    def replace_answer(answer: torch.Tensor) -> QuestionBatch:
        targets = batch.targets.clone()
        targets[batch.valid] = answer.flatten()
        tokens = torch.cat([batch.tokens[:, :1], targets[:, :-1]], 1)
        return dataclasses.replace(batch, tokens=tokens, targets=targets)

    assert answer_questions(model, replace_answer(greedy)).is_right.all()
    for place in range(5):
        other = greedy.clone()
        other[0, place] = (other[0, place] + 1) % VOCAB_SIZE
        right = answer_questions(model, replace_answer(other)).is_right[0, 0]
        assert right[:place].all()
        assert not right[place]


def test_controls_change_what_is_found_and_other_documents_take_their_share():
    model = build_gathering_model(CONFIG, seed=0)
    batch = make_batch(range(4))
    own = answer_questions(model, batch)
    assert own.own_share is not None
    assert torch.allclose(own.own_share, torch.ones(4, 3, 2))
    for control in ("other_document", "shuffled", "off"):
        wrong = answer_questions(model, batch, control=control)
        assert not torch.equal(wrong.nats, own.nats)
    without = MemorizingTransformer(dataclasses.replace(CONFIG, capacity=0))
    without.load_state_dict(model.state_dict())
    off = answer_questions(model, batch, control="off")
    assert off.own_share is None
    assert torch.equal(answer_questions(without, batch).nats, off.nats)
    others = [make_batch(range(4 * i, 4 * i + 4)) for i in range(1, 4)]
    crowded = answer_questions(model, batch, others=others).own_share
    assert crowded is not None
    assert 0.05 < float(crowded.mean()) < 0.95


def test_questions_that_do_not_fit_a_segment_are_refused():
    batch = make_pairs_batch([0], 3, BLOCK_LEN, num_questions=7)
    with pytest.raises(ValueError, match="ask fewer questions"):
        answer_questions(build_gathering_model(CONFIG, seed=0), batch)


@pytest.mark.parametrize(
    ("num_right", "num_asked", "expected"),
    [
        # Newcombe 1998, table I: 81 of 263, 15 of 148, 0 of 20, 1 of 29.
        (81, 263, (0.2553, 0.3662)),
        (15, 148, (0.0624, 0.1605)),
        (0, 20, (0.0, 0.1611)),
        (1, 29, (0.0061, 0.1718)),
        (20, 20, (0.8389, 1.0)),
    ],
)
def test_wilson_intervals_are_those_of_the_literature(
    num_right: int, num_asked: int, expected: tuple[float, float]
):
    assert compute_wilson_interval(num_right, num_asked) == pytest.approx(expected, abs=5e-5)


@pytest.mark.parametrize(("num_right", "num_asked"), [(0, 0), (3, 2), (-1, 2)])
def test_an_interval_of_nothing_is_refused(num_right: int, num_asked: int):
    with pytest.raises(ValueError, match=f"{num_right} right of {num_asked}"):
        compute_wilson_interval(num_right, num_asked)
