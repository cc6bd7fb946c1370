"""A trace shows what was retrieved, by the document's own positions."""

import pytest
import torch

from memorizing.analysis import explain_helped_tokens, trace_document
from memorizing.analysis.examples import _merge_entries
from memorizing.analysis.helped import HelpedToken
from memorizing.analysis.traces import RetrievedEntry
from memorizing.config import ModelConfig
from memorizing.errors import ConfigError
from memorizing.evaluation import evaluate_documents
from memorizing.model import MemorizingTransformer

TEXT = "ant bee cow dog elk fox bee gnu ant hen cow elk dog ibis bee ant fox"


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


def test_an_entry_at_p_holds_the_token_before_p(model, tokenizer, make_document):
    document = make_document("zoo", TEXT)
    tokens = document.tokens.tolist()
    # Token 15 follows "bee", which the document had as tokens 1 and 6.
    (trace,) = trace_document(model, document, tokenizer.start_token, 17, [15])
    assert trace.token == tokens[15]
    assert {entry.position for entry in trace.retrieved[:2]} == {2, 7}
    assert all(tokens[entry.position - 1] == tokens[14] for entry in trace.retrieved[:2])


def test_the_weights_of_a_query_sum_to_the_mean_gate(model, tokenizer, make_document):
    traces = trace_document(
        model, make_document("zoo", TEXT), tokenizer.start_token, 17, [16, 3, 5]
    )
    gate = model.gates()[0].mean().item()
    assert [trace.position for trace in traces] == [16, 3, 5]
    assert traces[1].retrieved == ()
    for trace in (traces[0], traces[2]):
        weights = [entry.weight for entry in trace.retrieved]
        assert sum(weights) == pytest.approx(gate, rel=1e-5)
        assert weights == sorted(weights, reverse=True)
        assert all(e.position < trace.position // 5 * 5 for e in trace.retrieved)


def test_a_trace_has_the_nats_of_the_evaluation(model, tokenizer, make_document):
    document = make_document("zoo", TEXT)
    result = evaluate_documents(model, [document], tokenizer.start_token, capacity=7)
    traces = trace_document(model, document, tokenizer.start_token, 7, range(17))
    nats = [trace.nats for trace in traces]
    assert nats == pytest.approx(result.documents[0].token_nats.tolist(), rel=1e-5)


@pytest.mark.parametrize("position", [-1, 17])
def test_a_position_outside_the_document_is_refused(model, tokenizer, make_document, position):
    with pytest.raises(ConfigError, match="allowed: 0 to 16"):
        trace_document(model, make_document("zoo", TEXT), tokenizer.start_token, 7, [3, position])


def test_examples_show_the_text_around_the_token_and_around_what_it_found(
    model, tokenizer, make_document
):
    documents = [make_document("farm", "ant bee cow"), make_document("zoo", TEXT)]
    helped = [HelpedToken(1, 13, 0.5, 3.0), HelpedToken(0, 0, 1.0, 2.0)]
    example, first = explain_helped_tokens(
        model,
        documents,
        tokenizer.start_token,
        tokenizer,
        helped,
        capacity=17,
        num_places=1,
        context_tokens=2,
        neighborhood=1,
    )
    assert (example.document, example.position) == ("zoo", 13)
    assert [part.split() for part in (example.before, example.token, example.after)] == [
        ["elk", "dog"],
        ["ibis"],
        ["bee", "ant"],
    ]
    # Token 13 follows "dog", which was token 3: its entry has position 4.
    (place,) = example.places
    assert (place.position, place.tokens_ago) == (4, 9)
    assert [part.split() for part in (place.before, place.entry, place.after)] == [
        ["bee", "cow"],
        ["dog"],
        ["elk", "fox"],
    ]
    assert 0.5 < place.share <= 1.0
    assert (first.before, first.token, first.places) == ("", "ant", ())
    assert first.to_dict()["document"] == "farm"


def test_entries_of_all_layers_and_of_one_neighborhood_are_one_place():
    entries = [
        RetrievedEntry(0, 20, 0.3),
        RetrievedEntry(1, 40, 0.2),
        RetrievedEntry(0, 42, 0.15),
        RetrievedEntry(2, 40, 0.05),
        RetrievedEntry(0, 23, 0.01),
    ]
    merged = _merge_entries(entries, neighborhood=3)
    assert [position for position, _ in merged] == [40, 20, 23]
    assert [weight for _, weight in merged] == pytest.approx([0.4, 0.3, 0.01])
