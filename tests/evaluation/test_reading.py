"""Evaluation reads every document whole, by itself, with the memory it was told to."""

import dataclasses
import math

import numpy as np
import pytest
import torch

from memorizing.config import ModelConfig
from memorizing.data import TokenizedDocument
from memorizing.errors import ConfigError
from memorizing.evaluation import (
    evaluate_documents,
)
from memorizing.evaluation.reading import _make_groups
from memorizing.model import MemorizingTransformer

VOCAB, SEGMENT, START = 31, 11, 30


def make_model(**settings: object) -> MemorizingTransformer:
    torch.manual_seed(0)
    config = ModelConfig(
        vocab_size=VOCAB,
        num_layers=2,
        model_dim=19,
        num_heads=2,
        head_dim=7,
        ffn_dim=23,
        segment_len=SEGMENT,
        window=5,
        memory_layers=(1,),
        capacity=17,
        num_neighbors=3,
        smear_keys=True,
        memory_dtype="float32",
    )
    return MemorizingTransformer(dataclasses.replace(config, **settings))  # type: ignore[arg-type]


def make_documents(*lengths: int, seed: int = 0) -> list[TokenizedDocument]:
    rng = np.random.default_rng(seed)
    return [
        TokenizedDocument(f"doc-{i}", rng.integers(START, size=n, dtype=np.int32), 2 * n + i)
        for i, n in enumerate(lengths)
    ]


def evaluate(documents: list[TokenizedDocument], **settings: object) -> list[np.ndarray]:
    settings = {"capacity": 53} | settings
    result = evaluate_documents(make_model(), documents, START, **settings)  # type: ignore[arg-type]
    return [document.token_nats for document in result.documents]


def test_nats_are_those_of_the_segments_read_one_by_one():
    (document,) = make_documents(37)
    model = make_model()
    state = model.init_state(1, 53)
    inputs = torch.tensor([[START, *document.tokens[:-1]]])
    targets = torch.from_numpy(document.tokens.astype(np.int64))
    expected = []
    for begin in range(0, 37, SEGMENT):
        part = slice(begin, begin + SEGMENT)
        output = model(inputs[:, part], state)
        state = output.state.commit()
        expected.append(
            torch.nn.functional.cross_entropy(output.logits[0], targets[part], reduction="none")
        )
    (nats,) = evaluate([document])
    np.testing.assert_allclose(nats, torch.cat(expected).detach().numpy(), rtol=1e-5)


@pytest.mark.parametrize("control", [None, "off"])
def test_a_document_has_the_same_nats_in_any_company(control):
    documents = make_documents(1, 10, 41, 11, 12, 0, 67)
    alone = [evaluate([d], control=control)[0] for d in documents if len(d.tokens)]
    for rows in (1, 2, 3, 7):
        together = evaluate(documents, rows=rows, control=control)
        assert [len(nats) for nats in together] == [1, 10, 41, 11, 12, 0, 67]
        for mine, expected in zip([n for n in together if len(n)], alone, strict=True):
            np.testing.assert_allclose(mine, expected, rtol=1e-5, atol=1e-6)


def test_a_small_memory_forgets_and_a_large_one_does_not():
    documents = make_documents(67, 41)
    small, large, none = (evaluate(documents, capacity=c) for c in (SEGMENT, 67, 0))
    reads, forgets = slice(SEGMENT, 2 * SEGMENT), slice(2 * SEGMENT, None)
    for row in range(2):
        assert np.array_equal(small[row][:SEGMENT], none[row][:SEGMENT])
        assert np.allclose(small[row][reads], large[row][reads], rtol=1e-5)
        assert not np.allclose(small[row][reads], none[row][reads], rtol=1e-3)
        assert not np.allclose(small[row][forgets], large[row][forgets], rtol=1e-3)


def test_off_is_a_memory_of_capacity_0():
    documents = make_documents(29, 13)
    for off, zero in zip(
        evaluate(documents, control="off"), evaluate(documents, capacity=0), strict=True
    ):
        assert np.array_equal(off, zero)


def test_the_memory_of_an_equal_document_is_as_good_as_the_own():
    (document,) = make_documents(43)
    own, other = evaluate([document])[0], evaluate([document] * 3, control="other_document")
    for nats in other:
        np.testing.assert_allclose(nats, own, rtol=1e-5)


def test_with_other_document_a_finished_document_is_still_read_by_its_neighbor():
    documents = make_documents(67, 23, 20)
    changed = [documents[0], dataclasses.replace(documents[1], tokens=documents[1].tokens[::-1])]
    before = evaluate(documents[:2], control="other_document")[0]
    after = evaluate(changed, control="other_document")[0]
    assert np.array_equal(before[:SEGMENT], after[:SEGMENT])
    assert not np.allclose(before[-SEGMENT:], after[-SEGMENT:], rtol=1e-3)
    # The third is the second's donor: who has gone changes nothing for those who stay.
    with_third = evaluate(documents, control="other_document")[0]
    np.testing.assert_allclose(with_third, before, rtol=1e-5)


@pytest.mark.parametrize("rows", [1, 2, 3, 5])
@pytest.mark.parametrize("num_documents", [2, 3, 5, 7, 11])
def test_no_document_is_left_without_another_to_read(rows, num_documents):
    groups = _make_groups(list(range(num_documents)), rows, "other_document", num_ranks=3)
    assert sorted(sum(groups, [])) == list(range(num_documents))
    assert all(2 <= len(group) <= max(rows, 3) for group in groups)


def test_shuffled_values_change_what_is_read_and_only_that():
    documents = make_documents(37, 31)
    own, off = evaluate(documents), evaluate(documents, control="off")
    shuffled = evaluate(documents, control="shuffled")
    again = evaluate(documents, control="shuffled")
    for row in range(2):
        assert np.allclose(shuffled[row][:SEGMENT], own[row][:SEGMENT], rtol=1e-5)
        assert not np.allclose(shuffled[row][SEGMENT:], own[row][SEGMENT:], rtol=1e-3)
        assert not np.allclose(shuffled[row][SEGMENT:], off[row][SEGMENT:], rtol=1e-3)
        assert np.array_equal(shuffled[row], again[row])


def test_max_tokens_reads_the_beginning_and_does_not_guess_bytes():
    documents = make_documents(37, 13)
    result = evaluate_documents(make_model(), documents, START, capacity=17, max_tokens=23)
    whole = evaluate_documents(make_model(), documents, START, capacity=17)
    assert [len(d.token_nats) for d in result.documents] == [23, 13]
    first = result.documents[0].token_nats
    np.testing.assert_allclose(first, whole.documents[0].token_nats[:23], rtol=1e-5)
    assert [d.num_bytes for d in result.documents] == [None, 2 * 13 + 1]
    assert result.bytes is None
    assert math.isnan(result.bits_per_byte)
    assert result.to_dict()["bits_per_byte"] is None


def test_evaluation_leaves_mode_and_gradients_as_they_were():
    model = make_model(dropout=0.5)
    model.train()
    first = evaluate_documents(model, make_documents(13), START, capacity=17)
    assert model.training
    with pytest.raises(ConfigError, match="vocabulary"):
        evaluate_documents(model, make_documents(13), VOCAB, capacity=17)
    assert model.training
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    again = evaluate_documents(model, make_documents(13), START, capacity=17)
    assert np.array_equal(first.documents[0].token_nats, again.documents[0].token_nats)


def test_a_model_without_memory_is_evaluated_with_capacity_0():
    model = make_model(memory_layers=(), capacity=0)
    result = evaluate_documents(model, make_documents(13, 2), START, capacity=0)
    assert result.tokens == 15
    with pytest.raises(ConfigError, match="no memory layer"):
        evaluate_documents(model, make_documents(13, 2), START, capacity=17)


@pytest.mark.parametrize(
    ("lengths", "settings", "message"),
    [
        ((), {}, "give documents"),
        ((0, 0), {}, "give documents"),
        ((13,), {"capacity": 2}, "num_neighbors = 3"),
        ((13,), {"rows": 0}, "1 or more"),
        ((13,), {"control": "other_document"}, "at least two documents"),
        ((13, 5), {"control": "other_document", "capacity": 0}, "above 0"),
        ((13,), {"control": "shuffled", "capacity": 0}, "above 0"),
    ],
)
def test_what_cannot_be_evaluated_is_refused(lengths, settings, message):
    with pytest.raises(ConfigError, match=message):
        evaluate(make_documents(*lengths), **settings)
