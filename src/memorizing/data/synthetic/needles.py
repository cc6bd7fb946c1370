"""Needles in varying filler text: passkey, several needles, variable tracking.

Filler is made of 50 words that follow one another by a random grammar of its document (4 successors
a word) and holds numbers of five digits, so that it can neither be told by heart nor be told from a
needle by its digits.

- A *needle* (Hsieh et al. 2024, RULER) is `<k> name name <v> d d d d d`, a name two words; the
  question `<q> name name <v>` asks for its digits. One needle is the passkey task (Mohtashami and
  Jaggi 2023).
- *Variable tracking* (RULER): `<k> x x <v> d d` gives a variable a number, `<k> y y <v> x x` the
  value of another variable. The question `<q> z z <v>` asks for the whole chain down to the number,
  `y y <v> x x <v> d d`: with the steps written out each is one look-up. A document has several
  chains; the questions ask for their ends.

The group of a question about a needle is its depth: 0 to 4, the fifth of the filler it stands in.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from memorizing.data.synthetic.batch import (
    BLOCK_LEN,
    FIRST_SYMBOL,
    QUESTION,
    RECORD,
    VALUE,
    VOCAB_SIZE,
    QuestionBatch,
    Sample,
    Tokens,
    join_questions,
    join_records,
    make_batch,
    spell_codes,
)

NUM_DIGITS = 10
FIRST_WORD = FIRST_SYMBOL + NUM_DIGITS
NUM_WORDS = VOCAB_SIZE - FIRST_WORD
NAME_LEN, NUMBER_LEN, SHORT_NUMBER_LEN = 2, 5, 2
NUM_NAMES = NUM_WORDS**NAME_LEN
NUM_DEPTHS = 5
NEEDLE_LEN = 1 + NAME_LEN + 1 + NUMBER_LEN
STATEMENT_LEN = 1 + NAME_LEN + 1 + NAME_LEN
_NUM_SUCCESSORS = 4
_NUMBER_EVERY = 64
"""Tokens of filler for each number in it."""


def make_needles_batch(
    seeds: Sequence[int],
    num_blocks: int,
    block_len: int = BLOCK_LEN,
    *,
    num_needles: int = 1,
    num_questions: int = 1,
    num_repeats: int = 1,
) -> QuestionBatch:
    """Make one document per seed: filler with needles at random places, and questions.

    `num_repeats`: as in `make_pairs_batch`.

    Raises:
        ValueError: no seed or block, more needles than fit or than there are names, or fewer
            needles than questions.
    """
    num_slots = num_blocks * (block_len // NEEDLE_LEN)
    _check(seeds, num_questions, num_needles, num_needles, num_slots)

    def make_sample(seed: int) -> Sample:
        rng = np.random.default_rng(seed)
        names = _draw_names(rng, num_needles)
        numbers = _draw_digits(rng, num_needles, NUMBER_LEN)
        slots = rng.choice(num_slots, num_needles, replace=False)
        text = make_filler(rng, num_blocks, block_len)
        _place(text, join_records(RECORD, names, numbers), slots)
        asked = slice(num_questions)  # names and places are in random order
        questions = join_records(QUESTION, names[asked], numbers[asked])
        depths = slots[asked] * NUM_DEPTHS // num_slots
        return join_questions(text.reshape(-1), questions, NAME_LEN + 2, rng, num_repeats, depths)

    return make_batch([make_sample(seed) for seed in seeds])


def make_tracking_batch(
    seeds: Sequence[int],
    num_blocks: int,
    block_len: int = BLOCK_LEN,
    *,
    num_chains: int = 4,
    num_hops: int = 2,
    num_repeats: int = 1,
) -> QuestionBatch:
    """Make one document per seed: filler with chains of assignments, a question about each chain.

    Every chain has `num_hops` assignments of variables to variables, and one of a number. They
    stand in random order. `num_repeats`: as in `make_pairs_batch`.

    Raises:
        ValueError: no seed, block or chain, or more assignments than fit or than there are names.
    """
    num_slots = num_blocks * (block_len // STATEMENT_LEN)
    num_variables = num_chains * (num_hops + 1)
    _check(seeds, num_chains, num_chains, num_variables, num_slots)

    def make_sample(seed: int) -> Sample:
        rng = np.random.default_rng(seed)
        names = _draw_names(rng, num_variables).reshape(num_hops + 1, num_chains, NAME_LEN)
        numbers = _draw_digits(rng, num_chains, SHORT_NUMBER_LEN)
        values = np.concatenate([numbers[None], names[:-1]])
        text = make_filler(rng, num_blocks, block_len)
        statements = join_records(RECORD, names.reshape(-1, 2), values.reshape(-1, 2))
        _place(text, statements, rng.choice(num_slots, num_variables, replace=False))
        marks = np.full((num_chains, 1), VALUE)
        chain = [np.full((num_chains, 1), QUESTION)]
        for part in (*names[::-1], numbers):
            chain += [part, marks]
        questions = np.concatenate(chain[:-1], axis=1)
        return join_questions(text.reshape(-1), questions, NAME_LEN + 2, rng, num_repeats)

    return make_batch([make_sample(seed) for seed in seeds])


def make_filler(rng: np.random.Generator, num_blocks: int, block_len: int) -> Tokens:
    """Text without needles, (blocks, block_len), by a grammar drawn from `rng`."""
    successors = rng.integers(NUM_WORDS, size=(NUM_WORDS, _NUM_SUCCESSORS))
    choices = rng.integers(_NUM_SUCCESSORS, size=(block_len, num_blocks))
    words = np.empty((block_len, num_blocks), dtype=np.int64)
    word = rng.integers(NUM_WORDS, size=num_blocks)
    for place in range(block_len):
        words[place] = word = successors[word, choices[place]]
    text = words.T + FIRST_WORD
    for _ in range(block_len // _NUMBER_EVERY):
        start = rng.integers(block_len - NUMBER_LEN + 1, size=(num_blocks, 1))
        columns = start + np.arange(NUMBER_LEN)
        text[np.arange(num_blocks)[:, None], columns] = _draw_digits(rng, num_blocks, NUMBER_LEN)
    return np.ascontiguousarray(text)


def _draw_names(rng: np.random.Generator, count: int) -> Tokens:
    return spell_codes(rng.choice(NUM_NAMES, count, replace=False), NAME_LEN, NUM_WORDS, FIRST_WORD)


def _draw_digits(rng: np.random.Generator, count: int, length: int) -> Tokens:
    return rng.integers(FIRST_SYMBOL, FIRST_WORD, (count, length))


def _place(text: Tokens, records: Tokens, slots: Tokens) -> None:
    """Write records (N, R) over the text (blocks, block_len) at N different slots, in place."""
    record_len = records.shape[1]
    block, slot = np.divmod(slots, text.shape[1] // record_len)
    text[block[:, None], slot[:, None] * record_len + np.arange(record_len)] = records


def _check(
    seeds: Sequence[int], num_questions: int, num_asked: int, num_records: int, num_slots: int
) -> None:
    most = min(num_slots, NUM_NAMES)
    if not len(seeds) or not 1 <= num_questions <= num_asked <= num_records <= most:
        raise ValueError(
            f"{len(seeds)} seeds, {num_questions} questions and {num_records} statements in "
            f"{num_slots} places; there must be 1 seed or more, 1 question or more about different "
            f"statements, and at most as many statements as places and as {NUM_NAMES} names"
        )
