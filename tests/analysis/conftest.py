"""A tiny vocabulary of words, and results made by hand."""

import io

import numpy as np
import pytest
import tokenizers
import torch
from rich.console import Console

from memorizing.config import ModelConfig
from memorizing.data import TokenizedDocument, Tokenizer
from memorizing.evaluation import DocumentResult, EvaluationResult
from memorizing.model import MemorizingTransformer

WORDS = ["ant", "bee", "cow", "dog", "elk", "fox", "gnu", " ", "(", "hen", "ibis"]
TEXT = "ant bee cow dog elk fox bee gnu ant hen cow elk dog ibis bee ant fox"


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


@pytest.fixture(scope="module")
def model(tokenizer):
    """Memory in the first layer, and queries that equal keys: a query finds its own input token."""
    torch.manual_seed(0)
    model = MemorizingTransformer(
        ModelConfig(
            vocab_size=tokenizer.vocab_size,
            num_layers=2,
            model_dim=23,
            num_heads=3,
            head_dim=13,
            ffn_dim=17,
            segment_len=5,
            window=3,
            memory_layers=(0,),
            capacity=11,
            num_neighbors=2,
            scale_init=7.0,
            memory_dtype="float32",
        )
    )
    with torch.no_grad():
        attention = model.blocks[0].attention
        attention.query.weight.copy_(attention.key.weight)
        attention.gate_bias.copy_(torch.tensor([0.0, 1.0, -2.0]))
    return model


def print_plainly(renderable: object) -> str:
    """What a terminal of 80 columns shows."""
    console = Console(file=io.StringIO(), width=80, color_system=None)
    console.print(renderable)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert all(len(line) <= 80 for line in text.splitlines())
    return text
