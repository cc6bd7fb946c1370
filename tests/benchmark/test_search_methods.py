"""Every way to search is timed with what it is compared with, or said to be missing."""

from __future__ import annotations

import sys
from typing import Any

import pytest

from memorizing.benchmark import Recording, SearchShape, benchmark_search
from memorizing.errors import ConfigError, IndexUnavailableError
from tests.benchmark.test_search import SHAPE


def test_without_faiss_the_rest_is_timed_and_the_report_says_so(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "faiss", None)
    result = benchmark_search((53,), shape=SHAPE, num_pairs=1, num_warmup=1)
    names = {row["name"] for row in result["rows"]} | {r["compared_with"] for r in result["rows"]}
    assert names == {"product", "exact", "topk"}
    assert "pip install 'memorizing[faiss]'" in result["unavailable"]["faiss_knn"]


def test_an_index_that_was_asked_for_and_is_not_installed_is_an_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(IndexUnavailableError, match="faiss"):
        benchmark_search((53,), ["exact", "faiss_flat"], shape=SHAPE, num_pairs=1)


def test_an_approximate_index_is_compared_with_the_product() -> None:
    pytest.importorskip("faiss")
    result = benchmark_search(
        (97,), ["faiss_flat:block_len=31"], shape=SHAPE, num_pairs=1, num_warmup=1
    )
    (row,) = [row for row in result["rows"] if row["settings"]]
    assert (row["name"], row["compared_with"]) == ("faiss_flat:block_len=31", "product")
    assert (row["settings"]["index"], row["settings"]["block_len"]) == ("faiss_flat", 31)
    assert row["recall"] > 0.9
    assert row["build_s"] > 0


def test_an_index_that_is_trained_on_queries_needs_some_that_are_not_timed(
    recording: Recording,
) -> None:
    pytest.importorskip("faiss")
    index = "faiss_ivf:train_on_queries=true,num_lists=2,num_probes=2,block_len=97"
    settings: dict[str, Any] = {"use_random": False, "num_pairs": 1, "num_warmup": 1}
    result = benchmark_search((97,), [index], shape=SHAPE, recording=recording, **settings)
    assert result["rows"][-1]["recall"] > 0.9
    shape = SearchShape(2, 23, 13, 3)
    with pytest.raises(ConfigError, match="record more queries, or search fewer"):
        benchmark_search((97,), [index], shape=shape, recording=recording, **settings)
