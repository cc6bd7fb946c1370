"""Dictionary look-up: records, then questions about them that only a memory can answer.

The task of Tworkowski et al. 2023 (Focused Transformer, section 5.2). A record is
`<k> k1 k2 k3 k4 <v> v1 v2 v3 v4`, a question the same with `<q>` in the place of `<k>`. A document
is records, then one block of questions about keys of the same document. Only the four value tokens
of questions count; a guess of one is right once in 60.
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
    VALUE,
    VOCAB_SIZE,
    QuestionBatch,
    Sample,
    Tokens,
    fill_blocks,
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
    return make_batch([_make_sample(seed, num_records, block_len, num_alike) for seed in seeds])


def _make_sample(seed: int, num_records: int, block_len: int, num_alike: int) -> Sample:
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


def join_records(marker: int, keys: Tokens, values: Tokens) -> Tokens:
    """`marker` k1 k2 ... `<v>` v1 v2 ... as (N, R), of keys and values with N lines each."""
    marks = np.full((2, len(keys), 1), [[[marker]], [[VALUE]]])
    return np.concatenate([marks[0], keys, marks[1], values], axis=1)
