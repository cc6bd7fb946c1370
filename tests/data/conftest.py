"""Trained tokenizers, and what they were trained on."""

import pytest

from memorizing.config import TokenizerConfig
from memorizing.data import Document, train_tokenizer

CODE = "".join(
    f"class Layer{i}(Module):\n    def forward(self, hidden):\n        return self.norm(hidden) "
    f"+ {i}\n\n"
    for i in range(97)
)
DOCUMENTS = [
    Document("code", CODE),
    Document("prose", "The gate opens, and the memory answers.\n" * 31),
]


@pytest.fixture(scope="session")
def bpe():
    return train_tokenizer(DOCUMENTS, TokenizerConfig(kind="bpe", vocab_size=431))


@pytest.fixture(scope="session")
def unigram():
    return train_tokenizer(DOCUMENTS, TokenizerConfig(kind="unigram", vocab_size=431))
