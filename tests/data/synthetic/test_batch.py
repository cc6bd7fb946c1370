"""The documents of pairs, needles, tracking and strings are what their tasks say."""

from collections.abc import Callable

import pytest
import torch

from memorizing.data.synthetic.batch import (
    FILLER,
    VOCAB_SIZE,
    QuestionBatch,
)
from memorizing.data.synthetic.needles import (
    NUM_NAMES,
    make_needles_batch,
    make_tracking_batch,
)
from memorizing.data.synthetic.records import (
    NUM_RECALL_KEYS,
    RECALL_VOCAB_SIZE,
    make_pairs_batch,
    make_recall_batch,
    make_strings_batch,
)

Maker = Callable[..., QuestionBatch]
MAKERS: list[tuple[Maker, dict[str, int], int]] = [
    (make_pairs_batch, {"num_questions": 5}, 2),
    (make_pairs_batch, {"num_questions": 5, "num_writes": 3}, 2),
    (make_needles_batch, {"num_needles": 7, "num_questions": 3}, 5),
    (make_tracking_batch, {"num_chains": 3, "num_hops": 2}, 8),
    (make_strings_batch, {"num_questions": 3}, 8),
    (make_recall_batch, {"num_pairs": 17, "num_questions": 3}, 1),
]
"""With the number of answer tokens of a question."""


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
    vocab_size = RECALL_VOCAB_SIZE if make is make_recall_batch else VOCAB_SIZE
    assert 0 <= int(batch.targets.min()) <= int(batch.targets.max()) < vocab_size
    alone = make([5], 2, 83, **sizes)
    assert torch.equal(alone.targets[0], batch.targets[1])
    assert not torch.equal(batch.targets[0], batch.targets[1])


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
        (make_recall_batch, 1, {"num_pairs": 42}),
        (make_recall_batch, 2, {"num_pairs": 7, "num_questions": 8}),
        (make_recall_batch, 999, {"num_pairs": NUM_RECALL_KEYS + 1}),
    ],
)
def test_a_document_that_cannot_be_is_refused(make: Maker, num_blocks: int, sizes: dict[str, int]):
    with pytest.raises(ValueError, match="there must be 1 seed or more"):
        make([0], num_blocks, 83, **sizes)
