"""Associative retrieval (Rodkin et al. 2024, ARMT): pairs key -> value, then keys asked for.

A record is `<k> k1 k2 k3 <v> v1 v2`. In the *rewrite* variant every key is written several times,
in any order, and the last value counts: what a key was paired with is found by content, which of
them was last is not.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from memorizing.data.synthetic.batch import (
    BLOCK_LEN,
    FIRST_SYMBOL,
    NUM_SYMBOLS,
    QUESTION,
    RECORD,
    VOCAB_SIZE,
    QuestionBatch,
    Sample,
    fill_blocks,
    join_questions,
    make_batch,
    spell_codes,
)
from memorizing.data.synthetic.look_up import join_records

KEY_LEN, VALUE_LEN = 3, 2
RECORD_LEN = 1 + KEY_LEN + 1 + VALUE_LEN
NUM_KEYS = NUM_SYMBOLS**KEY_LEN


def make_pairs_batch(
    seeds: Sequence[int],
    num_blocks: int,
    block_len: int = BLOCK_LEN,
    *,
    num_writes: int = 1,
    num_questions: int = 16,
    num_repeats: int = 1,
) -> QuestionBatch:
    """Make one document per seed: blocks full of records, then questions about different keys.

    Args:
        seeds: one document each; the same seed and sizes give the same document.
        num_blocks: of `block_len // 7` records each; filler where the writes do not come out even.
        block_len: tokens of a block.
        num_writes: records of each key. The values of a key differ in their first token, up to 60
            of them.
        num_questions: different keys asked for.
        num_repeats: how often each is asked. Answers to repeated questions stand in the questions
            themselves, where attention can learn with gradient what a key must look like.

    Raises:
        ValueError: no seed or block; fewer keys than questions, or more than there are; a number
            of writes that is not 1 to 60.
    """
    num_keys = num_blocks * (block_len // RECORD_LEN) // max(num_writes, 1)
    is_possible = 1 <= num_questions <= num_keys <= NUM_KEYS and 1 <= num_writes <= NUM_SYMBOLS
    if not len(seeds) or not is_possible:
        raise ValueError(
            f"{len(seeds)} seeds, {num_blocks} blocks of {block_len}, {num_writes} writes and "
            f"{num_questions} questions make {num_keys} keys; there must be 1 seed or more, 1 to "
            f"{NUM_SYMBOLS} writes, and at least as many keys as questions, at most {NUM_KEYS}"
        )
    return make_batch(
        [
            _make_sample(s, num_blocks, block_len, num_keys, num_writes, num_questions, num_repeats)
            for s in seeds
        ]
    )


def _make_sample(
    seed: int,
    num_blocks: int,
    block_len: int,
    num_keys: int,
    num_writes: int,
    num_questions: int,
    num_repeats: int,
) -> Sample:
    rng = np.random.default_rng(seed)
    keys = spell_codes(rng.choice(NUM_KEYS, num_keys, replace=False), KEY_LEN, NUM_SYMBOLS)
    written = rng.permutation(np.arange(num_keys).repeat(num_writes))
    # The symbols of a key's first value tokens: as many different ones as it is written times.
    drawn = rng.random((num_keys, NUM_SYMBOLS)).argsort(1)[:, :num_writes] + FIRST_SYMBOL
    order = written.argsort(kind="stable")
    values = rng.integers(FIRST_SYMBOL, VOCAB_SIZE, (len(written), VALUE_LEN))
    values[order, 0] = drawn.reshape(-1)
    last = order.reshape(num_keys, num_writes)[:, -1]
    asked = rng.choice(num_keys, num_questions, replace=False)
    blocks = np.zeros(num_blocks * block_len, dtype=np.int64)
    filled = fill_blocks(join_records(RECORD, keys[written], values), block_len)
    blocks[: len(filled)] = filled
    questions = join_records(QUESTION, keys[asked], values[last[asked]])
    return join_questions(blocks, questions, KEY_LEN + 2, rng, num_repeats)
