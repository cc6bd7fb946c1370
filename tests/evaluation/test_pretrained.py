from typing import Any

import numpy as np
import pytest
import torch

from memorizing.errors import ConfigError
from memorizing.evaluation.pretrained import evaluate_model
from memorizing.huggingface.sessions.opening import open_memory
from memorizing.loss import compute_token_nats
from tests.training.finetuning.tools import (
    SEGMENT_LEN,
    START,
    WINDOW,
    make_base,
    make_documents,
    make_model,
    make_texts,
    make_tokenizer,
    read_alone,
)

DOCUMENTS = make_documents(37, 5, 59)


@pytest.fixture(scope="module")
def model() -> Any:
    return make_model(capacity=61)


def test_every_token_counts_once_and_costs_what_a_reading_by_hand_says(model: Any):
    result = evaluate_model(model, DOCUMENTS)
    assert result.tokens == 37 + 5 + 59
    assert result.capacity == 61
    with open_memory(model) as memory:
        for document, found in zip(DOCUMENTS, result.documents, strict=True):
            logits = read_alone(model, document.tokens, memory)
            targets = torch.from_numpy(document.tokens).long().unsqueeze(0)
            expected = compute_token_nats(logits, targets)[0].numpy()
            np.testing.assert_allclose(found.token_nats, expected, atol=1e-5)
            assert found.num_bytes == document.num_bytes


def test_a_document_costs_the_same_alone_and_among_others(model: Any):
    alone = [evaluate_model(model, [document]).documents[0] for document in DOCUMENTS]
    for together, one in zip(evaluate_model(model, DOCUMENTS).documents, alone, strict=True):
        assert np.array_equal(together.token_nats, one.token_nats)


def test_memory_changes_what_lies_behind_the_first_segments_only(model: Any):
    on = evaluate_model(model, DOCUMENTS).documents[2].token_nats
    off = evaluate_model(model, DOCUMENTS, control="off").documents[2].token_nats
    assert np.array_equal(on[:SEGMENT_LEN], off[:SEGMENT_LEN])
    assert not np.allclose(on[2 * WINDOW :], off[2 * WINDOW :])
    assert np.array_equal(off, evaluate_model(model, DOCUMENTS, capacity=0).documents[2].token_nats)


def test_off_is_the_base_within_the_window(model: Any):
    off = evaluate_model(model, DOCUMENTS, control="off").documents[0].token_nats
    tokens = DOCUMENTS[0].tokens[:WINDOW].astype(np.int64)
    inputs = torch.from_numpy(np.concatenate([[START], tokens[:-1]])).unsqueeze(0)
    with torch.no_grad():
        logits = make_base()(input_ids=inputs).logits
    expected = compute_token_nats(logits, torch.from_numpy(tokens).unsqueeze(0))[0].numpy()
    np.testing.assert_allclose(off[:WINDOW], expected, atol=1e-5)


def test_texts_have_bytes_and_a_part_of_one_has_none(model: Any):
    result = evaluate_model(model, make_texts(53), make_tokenizer())
    assert (result.tokens, result.bytes) == (53, 53)
    assert result.bits_per_byte == pytest.approx(result.nats / np.log(2) / 53)
    part = evaluate_model(model, make_texts(53), make_tokenizer(), max_tokens=19)
    assert (part.tokens, part.bytes) == (19, None)


def test_the_mode_and_the_settings_are_as_before(model: Any):
    settings = model.memorizing.settings
    model.train()
    evaluate_model(model, DOCUMENTS[:1], capacity=0)
    assert model.training
    assert model.memorizing.settings == settings
    model.eval()


def test_what_cannot_be_evaluated_is_refused(model: Any):
    with pytest.raises(ConfigError, match="no tokens"):
        evaluate_model(model, [])
    with pytest.raises(ConfigError, match="at least two documents"):
        evaluate_model(model, DOCUMENTS[:1], control="other_document")
    with pytest.raises(ConfigError, match="needs a memory"):
        evaluate_model(model, DOCUMENTS, control="shuffled", capacity=0)
    with pytest.raises(ConfigError, match="at least num_neighbors = 5"):
        evaluate_model(model, DOCUMENTS, capacity=3)
    with pytest.raises(ConfigError, match="has no memory"):
        evaluate_model(make_base(), DOCUMENTS)
    with pytest.raises(ConfigError, match="give the tokenizer"):
        evaluate_model(model, make_texts(7))
