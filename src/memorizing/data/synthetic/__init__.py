"""Synthetic tasks that a memory is for: documents from a seed, and questions about them."""

from memorizing.data.synthetic.batch import (
    BLOCK_LEN,
    FILLER,
    FIRST_SYMBOL,
    NUM_SYMBOLS,
    QUESTION,
    RECORD,
    VALUE,
    VOCAB_SIZE,
    QuestionBatch,
    join_batches,
)
from memorizing.data.synthetic.look_up import (
    KEY_LEN,
    NUM_KEYS,
    RECORD_LEN,
    VALUE_LEN,
    compute_document_len,
    count_questions,
    make_look_up_batch,
)
from memorizing.data.synthetic.needles import NUM_DEPTHS, make_needles_batch, make_tracking_batch
from memorizing.data.synthetic.pairs import make_pairs_batch
from memorizing.data.synthetic.strings import make_strings_batch

__all__ = [
    "BLOCK_LEN",
    "FILLER",
    "FIRST_SYMBOL",
    "KEY_LEN",
    "NUM_DEPTHS",
    "NUM_KEYS",
    "NUM_SYMBOLS",
    "QUESTION",
    "RECORD",
    "RECORD_LEN",
    "VALUE",
    "VALUE_LEN",
    "VOCAB_SIZE",
    "QuestionBatch",
    "compute_document_len",
    "count_questions",
    "join_batches",
    "make_look_up_batch",
    "make_needles_batch",
    "make_pairs_batch",
    "make_strings_batch",
    "make_tracking_batch",
]
