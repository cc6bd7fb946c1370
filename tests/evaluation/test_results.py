"""What was measured, as sums, and compared document by document."""

import dataclasses
import json
import math

import numpy as np
import pytest

from memorizing.errors import ConfigError
from memorizing.evaluation import (
    DocumentResult,
    EvaluationResult,
    compare_results,
)


def _make_result(*nats: list[float]) -> EvaluationResult:
    return EvaluationResult(
        tuple(
            DocumentResult(f"doc-{i}", np.array(part, dtype=np.float32), 3 * len(part))
            for i, part in enumerate(nats)
        ),
        capacity=17,
    )


def test_the_result_in_json_has_the_sums():
    result = _make_result([1.0, 2.0, 3.0], [6.0])
    values = json.loads(json.dumps(result.to_dict(), allow_nan=False))
    assert (values["nats"], values["tokens"], values["bytes"]) == (12.0, 4, 12)
    assert values["perplexity"] == pytest.approx(math.exp(3.0))
    assert values["bits_per_byte"] == pytest.approx(1 / math.log(2))
    assert [d["perplexity"] for d in values["documents"]] == pytest.approx([math.e**2, math.e**6])
    assert values["by_position"][0]["tokens"] == 4
    assert [b.nats for b in result.by_position((1, 2))] == [7.0, 2.0, 3.0]
    assert result.longest == 3


def test_results_are_compared_token_by_token():
    difference = compare_results(
        _make_result([1.0, 2.0], [3.0]), _make_result([2.0, 2.0], [5.0]), block_len=1
    )
    assert difference.nats_per_token == pytest.approx(-1.0)
    assert difference.num_blocks == 3


def test_the_interval_of_results_draws_documents():
    """A quarter of the draws are of one document alone, however many blocks it has."""
    better, worse = [1.0] * 23, [3.0] * 23
    difference = compare_results(
        _make_result(better, worse), _make_result([2.0] * 23, [2.0] * 23), block_len=2
    )
    assert (difference.low, difference.high) == (-1.0, 1.0)


def test_results_of_other_documents_are_not_compared():
    result = _make_result([1.0, 2.0], [3.0])
    with pytest.raises(ConfigError, match="'doc-1' is in one only"):
        compare_results(result, _make_result([1.0, 2.0]))
    with pytest.raises(ConfigError, match="same tokenizer"):
        compare_results(result, _make_result([1.0], [3.0]))
    with pytest.raises(ConfigError, match="order"):
        compare_results(result, dataclasses.replace(result, documents=result.documents[::-1]))
