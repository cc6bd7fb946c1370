"""Nats of texts, read from their first token with memories of their own."""

from typing import Any

import numpy as np
import pytest

from memorizing.errors import ConfigError
from memorizing.evaluation import compare_results
from memorizing.evaluation.pretrained import evaluate_model
from memorizing.huggingface.sessions.opening import open_memory
from memorizing.huggingface.sessions.scoring import find_start_token, search_exactly
from tests.training.finetuning.tools import (
    SEGMENT_LEN,
    VOCAB_SIZE,
    make_base,
    make_documents,
    make_model,
    make_texts,
    make_tokenizer,
)

DOCUMENTS = make_documents(37, 5, 59)


@pytest.fixture(scope="module")
def model() -> Any:
    return make_model(capacity=61)


@pytest.mark.parametrize("control", ["other_document", "shuffled"])
def test_controls_change_what_is_retrieved_and_leave_no_trace(model: Any, control: Any):
    right = evaluate_model(model, DOCUMENTS)
    wrong = evaluate_model(model, DOCUMENTS, control=control)
    assert np.array_equal(
        wrong.documents[2].token_nats[:SEGMENT_LEN], right.documents[2].token_nats[:SEGMENT_LEN]
    )
    assert compare_results(wrong, right).nats_per_token != 0
    again = evaluate_model(model, DOCUMENTS)
    assert np.array_equal(again.documents[2].token_nats, right.documents[2].token_nats)
    attachment = model.memorizing
    assert attachment.mode.control is None
    assert not attachment.is_bound


def test_another_document_is_the_next_longer_one(model: Any):
    lengths = (29, 41, 31)
    documents = make_documents(*lengths, seed=11)
    found = evaluate_model(model, documents, control="other_document")
    changed = make_documents(*lengths, seed=11)
    changed[1] = make_documents(*lengths, seed=13)[1]
    other = evaluate_model(model, changed, control="other_document")
    same = [
        np.array_equal(a.token_nats, b.token_nats)
        for a, b in zip(found.documents, other.documents, strict=True)
    ]
    assert same == [True, False, False]


def test_an_open_memory_is_read_too_and_stays_open(model: Any):
    tokenizer, documents = make_tokenizer(), make_texts(101, 103)
    before = evaluate_model(model, documents[1:], tokenizer)
    with open_memory(model) as memory:
        memory.read(tokenizer, documents[1:], progress=False)
        knowing = evaluate_model(model, documents[1:], tokenizer)
        off = evaluate_model(model, documents[1:], tokenizer, control="off")
        assert model.memorizing.is_bound
    assert knowing.nats != before.nats
    assert off.nats == evaluate_model(model, documents[1:], tokenizer, capacity=0).nats


def test_searching_exactly_is_what_a_memory_without_an_index_does(model: Any):
    tokenizer, documents = make_tokenizer(), make_texts(101, 103)
    other = make_model(capacity=61, index="buckets:num_buckets=5,per_bucket=1")
    found = []
    for one in (model, other):
        with open_memory(one) as memory:
            memory.read(tokenizer, documents[1:], progress=False)
            found.append(evaluate_model(one, documents[:1], tokenizer).nats)
            with search_exactly(one.memorizing):
                found.append(evaluate_model(one, documents[:1], tokenizer).nats)
    exact, again, approximate, mended = found
    assert exact == again == mended != approximate


def test_calls_are_short_only_where_passages_are_looked_for():
    model, calls = make_model(read="passages", num_passages=1, passage_len=7, search_every=2), []
    documents = make_documents(23)
    for capacity, call_len in ((61, 2), (0, SEGMENT_LEN)):
        calls.clear()
        evaluate_model(
            model, documents, capacity=capacity, progress=lambda done, _: calls.append(done)
        )
        ends = [min(start + SEGMENT_LEN, 23) for start in range(0, 23, SEGMENT_LEN)]
        starts = [0, *ends[:-1]]
        assert calls == [
            min(at + call_len, end)
            for start, end in zip(starts, ends, strict=True)
            for at in range(start, end, call_len)
        ]


def test_the_start_token_is_that_of_the_tokenizer_then_of_the_model():
    assert find_start_token(make_base(), make_tokenizer()) == 257
    assert find_start_token(make_base(bos_token_id=None, eos_token_id=[5, 7])) == 5
    with pytest.raises(ConfigError, match="bos_token_id"):
        find_start_token(make_base(bos_token_id=None, eos_token_id=None))
    assert VOCAB_SIZE > 257
