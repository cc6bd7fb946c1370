"""A tokenizer is trained on a sample of documents, the same each time."""

import numpy as np
import pytest

from memorizing.config import TokenizerConfig
from memorizing.data import Document, train_tokenizer
from memorizing.data.tokenizer_training import sample_text
from memorizing.errors import CorpusError
from tests.data.conftest import CODE, DOCUMENTS


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_ids_fit_the_vocabulary_and_the_start_token_is_one_of_them(kind, request):
    tokenizer = request.getfixturevalue(kind)
    ids = tokenizer.encode(CODE)
    assert ids.dtype == np.int32
    assert ids.max() < tokenizer.vocab_size <= 431
    assert 0 <= tokenizer.start_token < tokenizer.vocab_size
    assert tokenizer.decode([tokenizer.start_token]) == "<|document|>"
    assert len(CODE) / len(ids) > 2


def test_training_twice_gives_the_same_tokenizer(bpe):
    again = train_tokenizer(DOCUMENTS, TokenizerConfig(kind="bpe", vocab_size=431))
    assert again.fingerprint == bpe.fingerprint
    smaller = train_tokenizer(DOCUMENTS, TokenizerConfig(kind="bpe", vocab_size=307))
    assert smaller.fingerprint != bpe.fingerprint
    assert smaller.vocab_size == 307


def test_no_text_trains_no_tokenizer():
    with pytest.raises(CorpusError, match="no text"):
        train_tokenizer([Document("empty", "")], TokenizerConfig())


def test_unigram_learns_words_that_repeat_only_as_a_whole(unigram):
    pieces = [unigram.decode([i]) for i in unigram.encode("        return self.norm(hidden)")]
    assert max(map(len, pieces)) >= 6
    assert "".join(pieces) == "        return self.norm(hidden)"


def test_a_sample_is_spread_evenly_over_documents():
    documents = [Document(f"d{i}", f"{i % 10}" * 163_840) for i in range(7)]
    sample = "".join(sample_text(documents, 573_440))
    assert 0.9 < len(sample) / 573_440 < 1.1
    counts = [sample.count(str(i)) for i in range(7)]
    assert max(counts) <= 2 * min(counts)
    assert "".join(sample_text(documents, 10**9)) == "".join(d.text for d in documents)
