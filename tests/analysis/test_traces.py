"""A trace shows what was retrieved for every token, by the document's own positions."""

import numpy as np
import pytest
import torch

from memorizing.analysis import trace_document
from memorizing.analysis.inspecting import compute_recall
from memorizing.analysis.traces import Recorder, Trace
from memorizing.config import ModelConfig
from memorizing.evaluation import evaluate_documents
from memorizing.model import MemorizingTransformer
from tests.analysis.conftest import TEXT


@pytest.fixture(scope="module")
def trace(model, tokenizer, make_document) -> Trace:
    return trace_document(model, make_document("zoo", TEXT), tokenizer.start_token, 17)


def test_a_place_is_the_token_after_the_one_that_was_stored(trace, make_document):
    tokens = make_document("zoo", TEXT).tokens.tolist()
    # Token 15 follows "bee", which the document had as tokens 1 and 6.
    for head in range(3):
        assert trace.places[15, head].tolist()[2:] == [-1] * 6
        assert set(trace.places[15, head].tolist()[:2]) == {2, 7}
    assert tokens[1] == tokens[6] == tokens[14]


def test_weights_sum_to_one_and_gates_are_the_model_s(model, trace):
    assert trace.heads == ((0, 0), (0, 1), (0, 2))
    assert (trace.places[:5] == -1).all()
    assert not trace.gates[:5].any()
    gates = model.gates()[0].numpy()
    for token in range(5, 17):
        assert trace.gates[token] == pytest.approx(gates, rel=1e-6)
        assert trace.weights[token].sum(-1) == pytest.approx(np.ones(3), rel=1e-5)
        assert (np.diff(trace.weights[token]) <= 0).all()
        assert (trace.places[token] <= token // 5 * 5 - 1).all()
    assert trace.by_age.sum(1) == pytest.approx(12 * gates, rel=1e-5)
    assert trace.by_distance.sum(1) == pytest.approx(12 * gates, rel=1e-5)


def test_a_head_that_points_counts_by_its_share_of_the_prediction_too(tokenizer, make_document):
    torch.manual_seed(0)
    model = MorePointing(
        ModelConfig(
            vocab_size=tokenizer.vocab_size, num_layers=2, model_dim=23, num_heads=3, head_dim=7,
            ffn_dim=11, segment_len=5, memory_layers=(0, 1), capacity=17, num_neighbors=2,
            pointer=True,
        )
    )  # fmt: skip
    trace = trace_document(model, make_document("zoo", TEXT), tokenizer.start_token, 17)
    assert not trace.gates[:5].any()
    shares = torch.cat(model.shares, 1)[:, 5:17].T
    for layer, heads in ((0, slice(0, 3)), (1, slice(3, 6))):
        gates = model.gates()[layer].numpy()
        expected = 1 - (1 - gates) * (1 - shares[:, heads].numpy())
        assert trace.gates[5:17, heads] == pytest.approx(expected, rel=1e-5)
        assert (trace.gates[5:17, heads] > gates).all()


class MorePointing(MemorizingTransformer):
    """Keeps the shares (heads of all layers, tokens) that its pointer gave, call after call."""

    def __init__(self, config):
        super().__init__(config)
        self.shares = []
        with torch.no_grad():
            self.pointer.share_bias += torch.arange(7)

        def keep(pointer, given, result):
            self.shares.append(torch.cat([of_layer[0] for of_layer in result[1]]))

        self.pointer.register_forward_hook(keep)


def test_a_trace_has_the_nats_of_the_evaluation(model, tokenizer, make_document):
    document = make_document("zoo", TEXT)
    result = evaluate_documents(model, [document], tokenizer.start_token, capacity=7)
    trace = trace_document(model, document, tokenizer.start_token, 7)
    assert trace.nats.tolist() == result.documents[0].token_nats.tolist()
    first = trace_document(model, document, tokenizer.start_token, 7, max_tokens=11)
    assert first.nats == pytest.approx(trace.nats[:11], rel=1e-6)
    assert (first.places == trace.places[:11]).all()


def test_the_heaviest_place_is_that_of_all_heads_together():
    recorder = Recorder(3, 2)
    places = torch.tensor([[[0, 1], [1, 0], [-1, -1]], [[1, 0], [2, 0], [-1, -1]]])
    weights = torch.tensor([[[0.7, 0.3], [0.6, 0.4], [0, 0]], [[0.8, 0.2], [0.9, 0.1], [0, 0]]])
    gates = torch.tensor([[0.5, 1.0, 1.0], [0.25, 0.1, 1.0]])
    recorder.add(4, 0, places, weights, weights, gates, [3, 5])
    trace = recorder.finish(np.zeros(3, np.float32))
    assert trace.heads == ((4, 3), (4, 5))
    place, weight = trace.pool()
    # 0: 0.5 * 0.7 + 0.25 * 0.2 against 0.5 * 0.3 + 0.25 * 0.8; halved, for two heads.
    assert place.tolist() == [0, 1, -1]
    assert weight.tolist() == pytest.approx([0.2, 0.3, 0.0])
    assert trace.list_weights(1) == [
        (1, pytest.approx(0.3)),
        (0, pytest.approx(0.2)),
        (2, pytest.approx(0.045)),
        (0, pytest.approx(0.005)),
    ]


def test_a_trace_of_nothing_retrieved_has_no_places():
    trace = Recorder(2, 3).finish(np.ones(2, np.float32))
    assert trace.num_tokens == 2
    assert trace.pool()[0].tolist() == [-1, -1]


def test_recall_counts_what_exact_search_finds_in_the_first_layer():
    def make(places):
        recorder = Recorder(1, 3)
        found = torch.tensor([[places]])
        weights = torch.ones(found.shape) / 3
        recorder.add(1, 0, found, weights, weights, torch.ones(1, 1), [0])
        recorder.add(2, 0, found * 0, weights, weights, torch.ones(1, 1), [0])
        return recorder.finish(np.zeros(1, np.float32))

    exact = make([5, 3, 7])
    assert compute_recall(make([7, 5, 3]), exact) == 1
    assert compute_recall(make([7, 2, 4]), exact) == pytest.approx(1 / 3)
    assert compute_recall(exact, make([5, -1, -1])) == 1
