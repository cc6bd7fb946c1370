"""Records of keys and values, and questions about keys that only a memory can answer.

- *Dictionary look-up* (Tworkowski et al. 2023, Focused Transformer, section 5.2). A record is
  `<k> k1 k2 k3 k4 <v> v1 v2 v3 v4`, a question the same with `<q>` in the place of `<k>`. A
  document is records, then one block of questions about keys of the same document. Only the four
  value tokens of questions count; a guess of one is right once in 60.
- *Associative retrieval* (Rodkin et al. 2024, ARMT). A record is `<k> k1 k2 k3 <v> v1 v2`. In the
  *rewrite* variant every key is written several times, in any order, and the last value counts:
  what a key was paired with is found by content, which of them was last is not.
- *Key-value strings* (Zhang et al. 2024, InfiniteBench): one of many pairs of identifiers is asked
  for. The text is JSON, a token a character: `"key":"value",` again and again, both identifiers of
  hexadecimal digits, and then `<q>"key":"value"` asks for the value. **Deviation:** identifiers
  have 8 digits (the benchmark's have 32), and a block ends in filler where the next pair does not
  fit whole.
- *Multi-query associative recall* (Arora et al. 2023, Zoology, MQAR). A pair is a key and its
  value, one token each of a vocabulary of 8,192; a question is a key, whose value comes next.
  **Deviations:** questions stand one after another at the end, where only a memory reaches the
  pairs, and not at gaps that follow a power law; pairs may be far apart, with other values between.
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
    Tokens,
    fill_blocks,
    join_questions,
    join_records,
    make_batch,
    spell_codes,
)

KEY_LEN = VALUE_LEN = 4
RECORD_LEN = 1 + KEY_LEN + 1 + VALUE_LEN
NUM_KEYS = NUM_SYMBOLS**KEY_LEN


def count_questions(block_len: int = BLOCK_LEN) -> int:
    """Questions (and records) that fit a block: 25 in 256 tokens, before 6 tokens of filler."""
    return block_len // RECORD_LEN


def compute_document_len(num_records: int, block_len: int = BLOCK_LEN) -> int:
    """Tokens of a document: whole blocks of records and one of questions."""
    return (-(-num_records // count_questions(block_len)) + 1) * block_len


def make_look_up_batch(
    seeds: Sequence[int], num_records: int, block_len: int = BLOCK_LEN, num_alike: int = 1
) -> QuestionBatch:
    """Make one document per seed: the same seed and sizes give the same document.

    Records stand in blocks of `block_len` tokens, as many as fit whole, the rest filler. The last
    block is questions, whose keys are drawn from all records with replacement. Keys are unique
    within a document; values need not be. `num_records=25` gives the documents of 512 tokens that
    the task is trained on.

    Args:
        seeds: one document each.
        num_records: of each document.
        block_len: tokens of a block.
        num_alike: keys come in families of this many that differ in one symbol, at the same place
            (the last family may be smaller). 1 draws all keys at random, as the paper does; two
            keys among a million then differ in one symbol for every question, but among the few
            hundred of a training memory hardly ever.

    Raises:
        ValueError: no seed; a block that holds no record; no record, or more than there are keys
            or families; families of more keys than there are symbols.
    """
    num_questions = count_questions(block_len)
    most = NUM_KEYS if num_alike == 1 else NUM_KEYS // NUM_SYMBOLS * num_alike
    is_possible = 1 <= num_alike <= NUM_SYMBOLS and 1 <= num_records <= most
    if not len(seeds) or num_questions < 1 or not is_possible:
        raise ValueError(
            f"{len(seeds)} seeds, block_len {block_len}, num_records {num_records} and num_alike "
            f"{num_alike}; there must be 1 seed or more, blocks of {RECORD_LEN} tokens or more, 1 "
            f"to {most} records and 1 to {NUM_SYMBOLS} alike"
        )

    def make_sample(seed: int) -> Sample:
        rng = np.random.default_rng(seed)
        keys = (
            spell_codes(rng.choice(NUM_KEYS, num_records, replace=False), KEY_LEN, NUM_SYMBOLS)
            if num_alike == 1
            else _draw_families(rng, num_records, num_alike)
        )
        values = rng.integers(FIRST_SYMBOL, VOCAB_SIZE, (num_records, VALUE_LEN))
        asked = rng.integers(num_records, size=count_questions(block_len))
        blocks = fill_blocks(join_records(RECORD, keys, values), block_len)
        questions = fill_blocks(join_records(QUESTION, keys[asked], values[asked]), block_len)
        place = np.arange(len(blocks) + block_len) - len(blocks)
        is_question = (place >= 0) & (place < len(asked) * RECORD_LEN)
        is_first = np.zeros(len(asked), dtype=bool)
        is_first[np.unique(asked, return_index=True)[1]] = True
        return Sample(
            np.concatenate([blocks, questions]),
            is_question & (place % RECORD_LEN >= KEY_LEN + 2),
            is_first,
            np.zeros(len(asked), dtype=np.int64),
        )

    return make_batch([make_sample(seed) for seed in seeds])


def _draw_families(rng: np.random.Generator, num_keys: int, num_alike: int) -> Tokens:
    """Keys (N, 4), all different; those of a family differ in the symbol of one place only."""
    num_families = -(-num_keys // num_alike)
    # Families that had all other symbols in common could share a key.
    heads = rng.choice(NUM_SYMBOLS ** (KEY_LEN - 1), num_families, replace=False)
    others = spell_codes(heads, KEY_LEN - 1, NUM_SYMBOLS).repeat(num_alike, 0)
    own = rng.permuted(np.tile(np.arange(NUM_SYMBOLS), (num_families, 1)), axis=1)[:, :num_alike]
    place = int(rng.integers(KEY_LEN))
    keys = np.insert(others, place, own.reshape(-1) + FIRST_SYMBOL, axis=1)
    return rng.permutation(keys[:num_keys])


PAIR_KEY_LEN, PAIR_VALUE_LEN = 3, 2
PAIR_LEN = 1 + PAIR_KEY_LEN + 1 + PAIR_VALUE_LEN
NUM_PAIR_KEYS = NUM_SYMBOLS**PAIR_KEY_LEN


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
    num_keys = num_blocks * (block_len // PAIR_LEN) // max(num_writes, 1)
    is_possible = 1 <= num_questions <= num_keys <= NUM_PAIR_KEYS and 1 <= num_writes <= NUM_SYMBOLS
    if not len(seeds) or not is_possible:
        raise ValueError(
            f"{len(seeds)} seeds, {num_blocks} blocks of {block_len}, {num_writes} writes and "
            f"{num_questions} questions make {num_keys} keys; there must be 1 seed or more, 1 to "
            f"{NUM_SYMBOLS} writes, and at least as many keys as questions, at most {NUM_PAIR_KEYS}"
        )

    def make_sample(seed: int) -> Sample:
        rng = np.random.default_rng(seed)
        keys = spell_codes(
            rng.choice(NUM_PAIR_KEYS, num_keys, replace=False), PAIR_KEY_LEN, NUM_SYMBOLS
        )
        written = rng.permutation(np.arange(num_keys).repeat(num_writes))
        # The symbols of a key's first value tokens: as many different ones as it is written times.
        drawn = rng.random((num_keys, NUM_SYMBOLS)).argsort(1)[:, :num_writes] + FIRST_SYMBOL
        order = written.argsort(kind="stable")
        values = rng.integers(FIRST_SYMBOL, VOCAB_SIZE, (len(written), PAIR_VALUE_LEN))
        values[order, 0] = drawn.reshape(-1)
        last = order.reshape(num_keys, num_writes)[:, -1]
        asked = rng.choice(num_keys, num_questions, replace=False)
        blocks = np.zeros(num_blocks * block_len, dtype=np.int64)
        filled = fill_blocks(join_records(RECORD, keys[written], values), block_len)
        blocks[: len(filled)] = filled
        questions = join_records(QUESTION, keys[asked], values[last[asked]])
        return join_questions(blocks, questions, PAIR_KEY_LEN + 2, rng, num_repeats)

    return make_batch([make_sample(seed) for seed in seeds])


NUM_HEX = 16
QUOTE, COLON, COMMA = range(FIRST_SYMBOL + NUM_HEX, FIRST_SYMBOL + NUM_HEX + 3)
ID_LEN = 8
STRING_LEN = 2 * (ID_LEN + 2) + 2
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
    num_pairs = num_blocks * (block_len // STRING_LEN)
    if not len(seeds) or not 1 <= num_questions <= num_pairs:
        raise ValueError(
            f"{len(seeds)} seeds, {num_questions} questions and {num_pairs} pairs in {num_blocks} "
            f"blocks of {block_len}; there must be 1 seed or more, and 1 question or more about "
            "different pairs"
        )

    def make_sample(seed: int) -> Sample:
        rng = np.random.default_rng(seed)
        keys = _draw_different(rng, num_pairs)
        values = spell_codes(rng.integers(NUM_IDS, size=num_pairs), ID_LEN, NUM_HEX)
        asked = rng.choice(num_pairs, num_questions, replace=False)
        blocks = fill_blocks(_join([], keys, values, [COMMA]), block_len)
        questions = _join([QUESTION], keys[asked], values[asked], [])
        # The closing quote is no part of the answer: it needs no memory.
        sample = join_questions(blocks, questions, ID_LEN + 5, rng, num_repeats)
        sample.is_answer[len(blocks) + STRING_LEN - 1 :: STRING_LEN] = False
        return sample

    return make_batch([make_sample(seed) for seed in seeds])


RECALL_VOCAB_SIZE = 8192
FIRST_RECALL_VALUE = RECALL_VOCAB_SIZE // 2
NUM_RECALL_KEYS = FIRST_RECALL_VALUE - FIRST_SYMBOL


def make_recall_batch(
    seeds: Sequence[int],
    num_blocks: int,
    block_len: int = BLOCK_LEN,
    *,
    num_pairs: int,
    num_questions: int = 64,
    num_repeats: int = 1,
) -> QuestionBatch:
    """Make one document per seed: pairs anywhere in the blocks, then questions about their keys.

    Tokens are below `RECALL_VOCAB_SIZE`: keys from `FIRST_SYMBOL`, values from
    `FIRST_RECALL_VALUE` on. Keys are unique; what is not a pair is values that no key is before.

    Args:
        seeds: one document each; the same seed and sizes give the same document.
        num_blocks: of `block_len` tokens.
        block_len: tokens of a block.
        num_pairs: of each document.
        num_questions: about different pairs.
        num_repeats: as in `make_pairs_batch`.

    Raises:
        ValueError: no seed or block, fewer pairs than questions, or more than there are keys or
            places.
    """
    places = num_blocks * (block_len // 2)
    if not len(seeds) or not 1 <= num_questions <= num_pairs <= min(places, NUM_RECALL_KEYS):
        raise ValueError(
            f"{len(seeds)} seeds, {num_questions} questions and {num_pairs} pairs in {num_blocks} "
            f"blocks of {block_len}; there must be 1 seed or more, 1 question or more about "
            f"different pairs, and at most {NUM_RECALL_KEYS} pairs that fit the blocks"
        )

    def make_sample(seed: int) -> Sample:
        rng = np.random.default_rng(seed)
        keys = rng.choice(NUM_RECALL_KEYS, (num_pairs, 1), replace=False) + FIRST_SYMBOL
        tokens = rng.integers(FIRST_RECALL_VALUE, RECALL_VOCAB_SIZE, (num_blocks, block_len))
        taken = np.sort(rng.choice(places, num_pairs, replace=False))
        block, place = taken // (block_len // 2), taken % (block_len // 2) * 2
        values = tokens[block, place + 1, None]
        tokens[block, place] = keys[:, 0]
        asked = rng.choice(num_pairs, num_questions, replace=False)
        questions = np.concatenate([keys[asked], values[asked]], axis=1)
        return join_questions(tokens.reshape(-1), questions, 1, rng, num_repeats)

    return make_batch([make_sample(seed) for seed in seeds])


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
