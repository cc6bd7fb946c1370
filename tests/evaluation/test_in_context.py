"""Passages of the text itself, found by BM25, before a window that is read anew."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import pytest
import torch

from memorizing.errors import ConfigError, IndexUnavailableError
from memorizing.evaluation.in_context import InContext, InContextReader, score_in_context
from memorizing.evaluation.pretrained import evaluate_in_context, evaluate_model
from memorizing.huggingface import open_memory
from memorizing.huggingface.attaching.attachment import remove_memory
from memorizing.loss import compute_token_nats
from tests.huggingface.sessions.tools import TOKENIZER
from tests.huggingface.tools import call, find_model, give_memory, make_tokens

pytest.importorskip("bm25s")

WINDOW, PASSAGE_LEN, NUM_PASSAGES = 29, 11, 2
HOW = InContext(stride=5, query_len=7)
START = 1


@pytest.fixture
def model() -> Any:
    model = find_model()
    give_memory(model, num_passages=NUM_PASSAGES, passage_len=PASSAGE_LEN)
    return model


def make_text(length: int, seed: int = 0) -> np.ndarray:
    return make_tokens(1, length, seed=seed)[0].numpy().clip(3)


def score_plainly(tokens: list[int], text: np.ndarray, start: int, end: int) -> np.ndarray:
    """Nats of text[start:end] where the model reads these tokens, by the model alone."""
    model = find_model()
    with torch.no_grad():
        logits = call(model, torch.tensor([tokens])).logits[:, start - end :]
    return compute_token_nats(logits, torch.from_numpy(text[None, start:end]).long())[0].numpy()


def test_the_best_passages_stand_before_the_window_the_best_one_last(model):
    text = make_text(131)
    # Words that stand nowhere else; of the passages that have them the first are taken, which
    # begin at inputs 1 + 3 * 5 and 1 + 8 * 5.
    text[text >= 90] = 50
    text[21:24] = 91, 92, 93
    text[46:48] = 91, 92
    text[113:120] = 91, 92, 93, 94, 95, 96, 97
    found = InContextReader(model, text, TOKENIZER, START, HOW).score(120, 125)
    inputs = [START, *text.tolist()]
    best, second = inputs[16 : 16 + PASSAGE_LEN], inputs[41 : 41 + PASSAGE_LEN]
    read = [START, *second, *best, *inputs[125 - WINDOW : 125]]
    assert np.allclose(found, score_plainly(read, text, 120, 125), atol=1e-5)


def test_a_text_within_the_window_is_read_by_the_model_alone(model):
    text = make_text(WINDOW)
    (found,) = score_in_context(model, [text], TOKENIZER, START, HOW)
    wanted = score_plainly([START, *text[:-1].tolist()], text, 0, WINDOW)
    assert np.allclose(found, wanted, atol=1e-5)


def test_no_later_token_matters(model):
    text, other = make_text(97), make_text(97, seed=5)
    other[:71] = text[:71]
    for stride in (5, WINDOW):
        how = InContext(stride, query_len=7)
        nats = score_in_context(model, [text, other], TOKENIZER, START, how)
        assert np.allclose(nats[0][:71], nats[1][:71], atol=1e-6)
        assert (nats[0] != nats[1]).any()


def test_parts_are_scored_alike_in_any_order(model):
    text = make_text(97)
    (whole,) = score_in_context(model, [text], TOKENIZER, START, HOW)
    reader = InContextReader(model, text, TOKENIZER, START, HOW)
    for start in (85, 40, 60):
        assert np.allclose(reader.score(start, start + 5), whole[start : start + 5], atol=1e-6)


def test_words_that_stand_nowhere_find_nothing(model):
    text = make_text(71).clip(max=50)
    text[60:68] = 99
    found = InContextReader(model, text, TOKENIZER, START, HOW).score(68, 71)
    read = [START, *text[70 - WINDOW : 70].tolist()]
    assert np.allclose(found, score_plainly(read, text, 68, 71), atol=1e-5)


def test_a_memory_that_is_open_is_not_read(model):
    text = make_text(71)
    before = score_in_context(model, [text], TOKENIZER, START, HOW)[0]
    with open_memory(model) as memory:
        memory.read(TOKENIZER, {"a": "w5 w6 w7 w8 w9 w10 w11"}, progress=False)
        assert np.array_equal(score_in_context(model, [text], TOKENIZER, START, HOW)[0], before)


def test_documents_are_evaluated_as_with_a_memory(model):
    class Text:
        name, text, num_bytes = "a", " ".join(f"w{token}" for token in make_text(43)), 150

    result = evaluate_in_context(model, [Text()], TOKENIZER, HOW)  # type: ignore[list-item]
    assert (result.tokens, result.bytes) == (43, 150)
    assert result.capacity == 0
    alone = evaluate_model(model, [Text()], TOKENIZER, capacity=0)  # type: ignore[list-item]
    first = slice(0, WINDOW)
    mine, other = (one.documents[0].token_nats[first] for one in (result, alone))
    assert np.allclose(mine, other, atol=1e-5)
    part = evaluate_in_context(model, [Text()], TOKENIZER, HOW, max_tokens=31)  # type: ignore[list-item]
    assert (part.tokens, part.bytes) == (31, None)


def test_empty_and_short_texts_have_the_nats_of_their_tokens(model):
    texts = [make_text(length) for length in (0, 1, 5, 6)]
    nats = score_in_context(model, texts, TOKENIZER, START, HOW)
    assert [len(part) for part in nats] == [0, 1, 5, 6]
    assert all(np.isfinite(part).all() for part in nats)


def test_what_cannot_work_says_what_to_do(model, monkeypatch):
    with pytest.raises(ConfigError, match="stride is 0"):
        InContext(0)
    with pytest.raises(ConfigError, match="query_len is -1"):
        InContext(4, -1)
    with pytest.raises(ConfigError, match="no tokens"):
        evaluate_in_context(model, [], TOKENIZER)
    with pytest.raises(ConfigError, match="stride is 30 and window 29"):
        score_in_context(model, [make_text(5)], TOKENIZER, START, InContext(30))
    monkeypatch.setitem(sys.modules, "bm25s", None)
    with pytest.raises(IndexUnavailableError, match=r'pip install "memorizing\[bm25\]"'):
        score_in_context(model, [make_text(5)], TOKENIZER, START, HOW)
    monkeypatch.undo()
    remove_memory(model)
    give_memory(model, window=190, segment_len=13, num_passages=2, passage_len=11)
    with pytest.raises(ConfigError, match=r"213 tokens, and the model reads 211"):
        score_in_context(model, [make_text(5)], TOKENIZER, START, HOW)
