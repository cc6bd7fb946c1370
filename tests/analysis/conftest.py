"""A tiny vocabulary of words, and results made by hand."""

import numpy as np
import pytest
import tokenizers

from memorizing.data import TokenizedDocument, Tokenizer
from memorizing.evaluation import DocumentResult, EvaluationResult

WORDS = ["ant", "bee", "cow", "dog", "elk", "fox", "gnu", " ", "(", "hen", "ibis"]


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    """A token per word, decoded with a space between."""
    vocab = {word: index for index, word in enumerate([*WORDS, "?"])}
    return Tokenizer(tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab, unk_token="?")))


@pytest.fixture(scope="session")
def make_document():
    """A document of words."""

    def make(name: str, words: str) -> TokenizedDocument:
        ids = [WORDS.index(word) for word in words.split()]
        return TokenizedDocument(name, np.array(ids, dtype=np.int32), len(words))

    return make


@pytest.fixture(scope="session")
def make_result():
    """A result of documents `a`, `b`, ... from lists of nats."""

    def make(*nats, capacity=512, control=None, num_bytes=7) -> EvaluationResult:
        documents = (
            DocumentResult("abcdefg"[i], np.array(part, dtype=np.float32), num_bytes)
            for i, part in enumerate(nats)
        )
        return EvaluationResult(tuple(documents), capacity, control)

    return make
