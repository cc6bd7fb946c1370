"""A model, a tokenizer of words, and texts that were read; sizes are different primes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from memorizing.benchmark.memory_use import asking, running
from memorizing.benchmark.memory_use.places import Package, encode_package
from memorizing.benchmark.memory_use.readers import Setup
from tests.huggingface.sessions.tools import TOKENIZER
from tests.huggingface.tools import LAYER, NUM_SINKS, SEGMENT_LEN, WINDOW, find_model, make_tokens

START = 1
"""What the model knows as the beginning of a text, and the tokenizer puts before one."""
PASSAGE_LEN, NUM_PASSAGES = 16, 2


def make_package(*lengths: int, name: str = "package") -> Package:
    """Random texts of so many words: a.txt, b.txt, ..."""
    texts = [
        (f"{letter}.txt", spell(make_tokens(1, length, seed=length)[0].tolist()))
        for letter, length in zip("abcdefg", lengths, strict=False)
    ]
    return encode_package(TOKENIZER, name, texts)


def spell(tokens: list[int]) -> str:
    """The words of tokens."""
    return " ".join(f"w{token}" for token in tokens)


def make_setup(folder: Path, **changes: Any) -> Setup:
    """A tiny model whose memory finds passages of 16 tokens; what was read is not rounded."""
    settings = {
        "layers": [LAYER],
        "window": WINDOW,
        "segment_len": SEGMENT_LEN,
        "num_sinks": NUM_SINKS,
        "num_passages": NUM_PASSAGES,
        "passage_margin": 20.0,
        "passage_len": PASSAGE_LEN,
        "dtype": "float32",
    }
    return Setup(find_model(), TOKENIZER, folder, settings, **changes)


def read_plainly(model: Any, tokens: list[int]) -> torch.Tensor:
    """Logits (T, V) of a text that is read at once."""
    with torch.no_grad():
        return model(torch.tensor([tokens]), use_cache=False).logits[0]


def interrupt_at(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """Ctrl-C instead of the answer of this number, counted from 1."""
    asked = []

    def ask(*words: Any, **named: Any) -> asking.Asked:
        asked.append(words)
        if len(asked) == number:
            raise KeyboardInterrupt
        return asking.ask(*words, **named)

    monkeypatch.setattr(running, "ask", ask)
