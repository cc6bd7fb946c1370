"""A trace shows what was retrieved, by the document's own positions."""

import pytest

from memorizing.analysis import trace_document
from memorizing.errors import ConfigError
from memorizing.evaluation import evaluate_documents
from tests.analysis.conftest import TEXT


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
