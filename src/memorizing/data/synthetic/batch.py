"""What all synthetic tasks share: their vocabulary, blocks of records, and documents in a batch.

A document is whole blocks that only a memory can keep, then questions about them. Records are kept
whole within a block, so that with segments of `block_len` none straddles two.

Shapes: D documents, L tokens of a document, Q questions of a document, A answer tokens of a
question, N records, R tokens of a record.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

VOCAB_SIZE = 64
"""Tokens 0 to 3 are markers, 4 to 63 symbols."""
FILLER, RECORD, QUESTION, VALUE = range(4)
"""`FILLER` is the start token too: a document's first input, and what fills a block to its end."""
FIRST_SYMBOL = 4
NUM_SYMBOLS = VOCAB_SIZE - FIRST_SYMBOL
BLOCK_LEN = 256

Tokens = NDArray[np.int64]
Mask = NDArray[np.bool_]


@dataclass(frozen=True)
class Sample:
    """One document of a task."""

    tokens: Tokens
    """(L,)."""
    is_answer: Mask
    """(L,): the tokens that count; every question has the same number A of them."""
    is_first: Mask
    """(Q,): see `QuestionBatch`."""
    group: Tokens
    """(Q,): see `QuestionBatch`."""


@dataclass(frozen=True)
class QuestionBatch:
    """Documents of one length side by side. `tokens[d, i]` predicts `targets[d, i]`.

    The first input is the start token, so every token of a document is a target once. All tokens
    are real: `valid` is for the loss and not for the model, which reads and remembers everything.
    """

    tokens: Tensor
    """(D, L) int64."""
    targets: Tensor
    """(D, L) int64."""
    valid: Tensor
    """(D, L) bool: the target is part of an answer. Each row has Q A of them, in the order of the
    questions: `x[valid].view(D, Q, -1)` is x by question."""
    is_first: Tensor
    """(D, Q) bool: no earlier question of the document asks the same. The others can be answered
    from the questions themselves, without any memory."""
    group: Tensor
    """(D, Q) int64: what kind of question it is, as its task says; 0 where there is but one."""

    def iterate_segments(self, segment_len: int) -> Iterator[QuestionBatch]:
        """The documents in pieces of `segment_len` tokens, the last may be shorter.

        Each carries all of `is_first` and `group`.
        """
        pieces = (
            part.split(segment_len, dim=1) for part in (self.tokens, self.targets, self.valid)
        )
        for tokens, targets, valid in zip(*pieces, strict=True):
            yield QuestionBatch(tokens, targets, valid, self.is_first, self.group)


def make_batch(samples: Sequence[Sample]) -> QuestionBatch:
    """Put documents of one length side by side."""
    targets = torch.from_numpy(np.stack([sample.tokens for sample in samples]))
    return QuestionBatch(
        torch.cat([torch.full((len(samples), 1), FILLER), targets[:, :-1]], 1),
        targets,
        torch.from_numpy(np.stack([sample.is_answer for sample in samples])),
        torch.from_numpy(np.stack([sample.is_first for sample in samples])),
        torch.from_numpy(np.stack([sample.group for sample in samples])),
    )


def join_batches(batches: Sequence[QuestionBatch]) -> QuestionBatch:
    """More documents of the same length."""
    names = QuestionBatch.__annotations__
    return QuestionBatch(*(torch.cat([getattr(b, name) for b in batches]) for name in names))


def spell_codes(codes: Tokens, length: int, base: int, first: int = FIRST_SYMBOL) -> Tokens:
    """Numbers (N,) below base^length as words (N, length) of `base` symbols from `first` on."""
    return codes[:, None] // base ** np.arange(length) % base + first


def fill_blocks(records: Tokens, block_len: int) -> Tokens:
    """Records (N, R) one after another, as many as fit whole in a block, whose rest is filler."""
    num_records, record_len = records.shape
    per_block = block_len // record_len
    num_blocks = -(-num_records // per_block)
    slots = np.full((num_blocks * per_block, record_len), FILLER, dtype=np.int64)
    slots[:num_records] = records
    blocks = np.full((num_blocks, block_len), FILLER, dtype=np.int64)
    blocks[:, : per_block * record_len] = slots.reshape(num_blocks, -1)
    return blocks.reshape(-1)


def join_questions(
    blocks: Tokens,
    questions: Tokens,
    answer_start: int,
    rng: np.random.Generator,
    num_repeats: int = 1,
    group: Tokens | None = None,
) -> Sample:
    """A document of blocks (L',) and questions right after them.

    Args:
        blocks: what is asked about.
        questions: (N, R), all different.
        answer_start: their tokens from here on are the answer.
        rng: draws their order where they are repeated.
        num_repeats: how often each is asked: Q = N num_repeats.
        group: (N,), their groups; None is 0.
    """
    num_different, question_len = questions.shape
    asked = np.arange(num_different)
    if num_repeats != 1:
        asked = rng.permutation(asked.repeat(num_repeats))
    is_first = np.zeros(len(asked), dtype=bool)
    is_first[np.unique(asked, return_index=True)[1]] = True
    is_answer = np.zeros(len(blocks) + len(asked) * question_len, dtype=bool)
    is_answer[len(blocks) :] = np.tile(np.arange(question_len) >= answer_start, len(asked))
    return Sample(
        np.concatenate([blocks, questions[asked].reshape(-1)]),
        is_answer,
        is_first,
        np.zeros(len(asked), dtype=np.int64) if group is None else group[asked],
    )


def join_records(marker: int, keys: Tokens, values: Tokens) -> Tokens:
    """`marker` k1 k2 ... `<v>` v1 v2 ... as (N, R), of keys and values with N lines each."""
    marks = np.full((2, len(keys), 1), [[[marker]], [[VALUE]]])
    return np.concatenate([marks[0], keys, marks[1], values], axis=1)
