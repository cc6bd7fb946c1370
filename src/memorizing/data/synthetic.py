"""Dictionary look-up: records, then questions about them that only a memory can answer.

The task of Tworkowski et al. 2023 (Focused Transformer, section 5.2). A record is
`<k> k1 k2 k3 k4 <v> v1 v2 v3 v4`, a question the same with `<q>` in the place of `<k>`. A document
is records, then one block of questions about keys of the same document. Only the four value tokens
of questions count.

Shapes: D documents, L tokens of a document, Q questions of a document.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

VOCAB_SIZE = 64
"""Tokens 0 to 3 are markers, 4 to 63 make up keys and values: a guess is right once in 60."""
FILLER, RECORD, QUESTION, VALUE = range(4)
"""`FILLER` is the start token too: a document's first input, and what fills a block to its end."""
FIRST_SYMBOL = 4
NUM_SYMBOLS = VOCAB_SIZE - FIRST_SYMBOL
KEY_LEN = VALUE_LEN = 4
RECORD_LEN = 1 + KEY_LEN + 1 + VALUE_LEN
NUM_KEYS = NUM_SYMBOLS**KEY_LEN
BLOCK_LEN = 256


@dataclass(frozen=True)
class LookUpBatch:
    """Documents of one length side by side. `tokens[d, i]` predicts `targets[d, i]`.

    The first input is the start token, so every token of a document is a target once. All tokens
    are real: `valid` is for the loss and not for the model, which reads and remembers everything.
    """

    tokens: Tensor
    """(D, L) int64."""
    targets: Tensor
    """(D, L) int64."""
    valid: Tensor
    """(D, L) bool: the target is a value token of a question. Each row has 4 Q of them, in the
    order of the questions: `x[valid].view(D, Q, 4)` is x by question."""
    is_first: Tensor
    """(D, Q) bool: no earlier question of the document asks for this key. The others can be
    answered from the block of questions itself, without any memory."""

    def iterate_segments(self, segment_len: int) -> Iterator[LookUpBatch]:
        """The documents in pieces of `segment_len` tokens; each carries all of `is_first`."""
        pieces = (
            part.split(segment_len, dim=1) for part in (self.tokens, self.targets, self.valid)
        )
        for tokens, targets, valid in zip(*pieces, strict=True):
            yield LookUpBatch(tokens, targets, valid, self.is_first)


def count_questions(block_len: int = BLOCK_LEN) -> int:
    """Questions (and records) that fit a block: 25 in 256 tokens, before 6 tokens of filler."""
    return block_len // RECORD_LEN


def compute_document_len(num_records: int, block_len: int = BLOCK_LEN) -> int:
    """Tokens of a document: whole blocks of records and one of questions."""
    return (-(-num_records // count_questions(block_len)) + 1) * block_len


def make_look_up_batch(
    seeds: Sequence[int], num_records: int, block_len: int = BLOCK_LEN
) -> LookUpBatch:
    """Make one document per seed: the same seed and sizes give the same document.

    Records stand in blocks of `block_len` tokens, as many as fit whole, the rest filler: with
    segments of `block_len` none straddles two. The last block is questions, whose keys are drawn
    from all records with replacement. Keys are unique within a document; values need not be.
    `num_records=25` gives the documents of 512 tokens that the task is trained on.

    Raises:
        ValueError: no seed; a block that holds no record; no record, or more than there are keys.
    """
    num_questions = count_questions(block_len)
    if not len(seeds) or num_questions < 1 or not 1 <= num_records <= NUM_KEYS:
        raise ValueError(
            f"{len(seeds)} seeds, block_len {block_len} and num_records {num_records}; there must "
            f"be 1 seed or more, blocks of {RECORD_LEN} tokens or more and 1 to {NUM_KEYS} records"
        )
    made = [_make_document(seed, num_records, block_len) for seed in seeds]
    targets = torch.from_numpy(np.stack([document for document, _ in made]))
    tokens = torch.cat([torch.full((len(made), 1), FILLER), targets[:, :-1]], 1)
    place = torch.arange(block_len)
    is_answer = (place < num_questions * RECORD_LEN) & (place % RECORD_LEN >= KEY_LEN + 2)
    valid = torch.zeros_like(targets, dtype=torch.bool)
    valid[:, -block_len:] = is_answer
    return LookUpBatch(tokens, targets, valid, torch.from_numpy(np.stack([f for _, f in made])))


def _make_document(seed: int, num_records: int, block_len: int) -> tuple[np.ndarray, np.ndarray]:
    """The tokens (L,) int64 of a document, and `is_first` (Q,) bool."""
    rng = np.random.default_rng(seed)
    codes = rng.choice(NUM_KEYS, num_records, replace=False)
    keys = codes[:, None] // NUM_SYMBOLS ** np.arange(KEY_LEN) % NUM_SYMBOLS + FIRST_SYMBOL
    values = rng.integers(FIRST_SYMBOL, VOCAB_SIZE, (num_records, VALUE_LEN))
    asked = rng.integers(num_records, size=count_questions(block_len))
    document = np.concatenate(
        [
            _fill_blocks(RECORD, keys, values, block_len),
            _fill_blocks(QUESTION, keys[asked], values[asked], block_len),
        ]
    )
    is_first = np.zeros(len(asked), dtype=bool)
    is_first[np.unique(asked, return_index=True)[1]] = True
    return document, is_first


def _fill_blocks(marker: int, keys: np.ndarray, values: np.ndarray, block_len: int) -> np.ndarray:
    """Records or questions one after another, in blocks that end in filler."""
    per_block = count_questions(block_len)
    num_blocks = -(-len(keys) // per_block)
    marks = np.full((2, len(keys), 1), [[[marker]], [[VALUE]]])
    records = np.concatenate([marks[0], keys, marks[1], values], axis=1)
    slots = np.full((num_blocks * per_block, RECORD_LEN), FILLER)
    slots[: len(records)] = records
    blocks = np.full((num_blocks, block_len), FILLER)
    blocks[:, : per_block * RECORD_LEN] = slots.reshape(num_blocks, -1)
    return blocks.reshape(-1)
