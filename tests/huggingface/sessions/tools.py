"""A tokenizer of words, documents, and what is done with them in all tests of a session."""

from __future__ import annotations

from typing import Any

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from memorizing.huggingface import MemorySession
from memorizing.huggingface.attaching.attachment import get_attachment
from tests.huggingface.tools import (
    LAYER,
    SEGMENT_LEN,
    VOCAB_SIZE,
    make_tokens,
    read,
)

QUESTION = make_tokens(2, 41, seed=11)


def make_tokenizer(first: int = 3) -> Any:
    """Words w<number> -> number; a start token before every text."""
    words = {f"w{number}": number for number in range(first, VOCAB_SIZE)}
    tokenizer = Tokenizer(WordLevel({"<pad>": 0, "<s>": 1, "</s>": 2} | words, unk_token="<pad>"))
    tokenizer.pre_tokenizer = Whitespace()  # type: ignore[assignment]
    tokenizer.post_processor = TemplateProcessing(  # type: ignore[assignment]
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>")


TOKENIZER = make_tokenizer()
DOCUMENTS = {
    name: " ".join(f"w{token}" for token in make_tokens(1, length, seed=length)[0].tolist())
    for name, length in (("first", 67), ("second", 30), ("third", 38))
}
"""68, 31 and 39 tokens with the start token; all but the first three of each are entries."""
NUM_ENTRIES = {"first": 65, "second": 28, "third": 36}


def ask(model: Any) -> Tensor:
    with torch.no_grad():
        return read(model, QUESTION, SEGMENT_LEN)


def read_all(memory: MemorySession, documents: Any = None) -> Any:
    return memory.read(TOKENIZER, DOCUMENTS if documents is None else documents, progress=False)


def fetch_entries(model: Any, layer: int = LAYER) -> tuple[Tensor, Tensor]:
    """Keys and values (H, n, D) that are open now."""
    base = get_attachment(model).opened.base[layer]
    blocks = [block.load() for block in base.blocks]
    return (
        torch.cat([block.keys[0] for block in blocks], 1),
        torch.cat([block.values[0] for block in blocks], 1),
    )
