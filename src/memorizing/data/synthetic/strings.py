"""Key-value strings (Zhang et al. 2024, InfiniteBench): one of many pairs of identifiers asked for.

The text is JSON, a token a character: `"key":"value",` again and again, both identifiers of
hexadecimal digits, and then `<q>"key":"value"` asks for the value.

**Deviation:** identifiers have 8 digits (the benchmark's have 32), and a block ends in filler where
the next pair does not fit whole.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from memorizing.data.synthetic.batch import (
    BLOCK_LEN,
    FIRST_SYMBOL,
    QUESTION,
    QuestionBatch,
    Sample,
    Tokens,
    fill_blocks,
    join_questions,
    make_batch,
    spell_codes,
)

NUM_HEX = 16
QUOTE, COLON, COMMA = range(FIRST_SYMBOL + NUM_HEX, FIRST_SYMBOL + NUM_HEX + 3)
ID_LEN = 8
PAIR_LEN = 2 * (ID_LEN + 2) + 2
NUM_IDS = NUM_HEX**ID_LEN


def make_strings_batch(
    seeds: Sequence[int],
    num_blocks: int,
    block_len: int = BLOCK_LEN,
    *,
    num_questions: int = 8,
    num_repeats: int = 1,
) -> QuestionBatch:
    """Make one document per seed: blocks full of pairs, then questions about different keys.

    `num_repeats`: as in `make_pairs_batch`.

    Raises:
        ValueError: no seed or block, or fewer pairs than questions.
    """
    num_pairs = num_blocks * (block_len // PAIR_LEN)
    if not len(seeds) or not 1 <= num_questions <= num_pairs:
        raise ValueError(
            f"{len(seeds)} seeds, {num_questions} questions and {num_pairs} pairs in {num_blocks} "
            f"blocks of {block_len}; there must be 1 seed or more, and 1 question or more about "
            "different pairs"
        )
    return make_batch(
        [_make_sample(s, num_pairs, block_len, num_questions, num_repeats) for s in seeds]
    )


def _make_sample(
    seed: int, num_pairs: int, block_len: int, num_questions: int, num_repeats: int
) -> Sample:
    rng = np.random.default_rng(seed)
    keys = _draw_different(rng, num_pairs)
    values = spell_codes(rng.integers(NUM_IDS, size=num_pairs), ID_LEN, NUM_HEX)
    asked = rng.choice(num_pairs, num_questions, replace=False)
    blocks = fill_blocks(_join([], keys, values, [COMMA]), block_len)
    questions = _join([QUESTION], keys[asked], values[asked], [])
    # The closing quote is no part of the answer: it needs no memory.
    sample = join_questions(blocks, questions, ID_LEN + 5, rng, num_repeats)
    sample.is_answer[len(blocks) + PAIR_LEN - 1 :: PAIR_LEN] = False
    return sample


def _draw_different(rng: np.random.Generator, count: int) -> Tokens:
    """Identifiers (count, 8), no two alike."""
    codes = np.unique(rng.integers(NUM_IDS, size=count))
    while len(codes) < count:
        codes = np.unique(np.append(codes, rng.integers(NUM_IDS, size=count - len(codes))))
    return spell_codes(rng.permutation(codes), ID_LEN, NUM_HEX)


def _join(before: list[int], keys: Tokens, values: Tokens, after: list[int]) -> Tokens:
    def repeat(*marks: int) -> Tokens:
        return np.tile(np.array(marks, dtype=np.int64), (len(keys), 1))

    parts = [repeat(*before, QUOTE), keys, repeat(QUOTE, COLON, QUOTE), values]
    return np.concatenate([*parts, repeat(QUOTE, *after)], axis=1)
