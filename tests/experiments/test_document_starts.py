"""Spans of held-out documents are read as documents, by both models of a pair."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from memorizing.data import TokenizedDocument
from memorizing.evaluation import evaluate_documents
from memorizing.training import load_model
from tests.experiments.pair_of_runs import MODEL, NUM_TOKENS, SIZE
from tests.experiments.scripts import open_script


@pytest.fixture(scope="module")
def script() -> Iterator[ModuleType]:
    with open_script("document_starts") as module:
        yield module


def test_spans_are_whole_different_and_parts_of_the_document(script: ModuleType) -> None:
    document = TokenizedDocument("d", np.arange(97, dtype=np.int32), 97)
    spans = script.cut_spans(document, 10, 7)
    starts = [int(span.tokens[0]) for span in spans]
    assert starts == sorted(set(starts))
    assert len(starts) == 7
    for start, span in zip(starts, spans, strict=True):
        assert start % 10 == 0
        assert np.array_equal(span.tokens, document.tokens[start : start + 10])
    assert len(script.cut_spans(document, 10, 99)) == 9
    assert [s.name for s in script.cut_spans(document, 10, 7)] == [s.name for s in spans]


def test_both_models_read_each_span_alone_and_pairs_are_kept(
    script: ModuleType, runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "starts.json"
    words = ["--families", "tiny", "--seeds", "0", "--spans", "9", "--json", str(path)]
    assert script.main([*words, "--runs", str(runs)]) == 0
    pair = json.loads(path.read_text())["pairs"]["tiny-seed0"]
    path.write_text(json.dumps({"pairs": {"gone-seed7": pair}}))
    assert script.main([*words, "--runs", str(runs)]) == 0
    assert json.loads(path.read_text())["pairs"] == {"gone-seed7": pair, "tiny-seed0": pair}
    assert "gone-seed7" in capsys.readouterr().out

    # The same, one span after another.
    assert (pair["spans"], pair["documents"], pair["span_len"]) == (10, 2, MODEL["segment_len"])
    for arm, capacity in (("cache", 0), ("memory", SIZE)):
        run_dir = runs / "main" / f"tiny-{arm}-seed0"
        loaded = load_model(run_dir)
        config = script.read_run_config(run_dir)
        spans = [
            span
            for document in script.load_documents(config, loaded.tokenizer, NUM_TOKENS, "test")
            for span in script.cut_spans(document, pair["span_len"], 5)
        ]
        read = [
            evaluate_documents(loaded.model, [s], loaded.tokenizer.start_token, capacity=capacity)
            for s in spans
        ]
        nats = np.concatenate([result.documents[0].token_nats for result in read])
        assert pair["nats_per_token"][arm] == pytest.approx(nats.mean(), rel=1e-5)

    assert script.main([*words, "--runs", str(tmp_path / "none")]) == 2
    assert "error: " in capsys.readouterr().err
