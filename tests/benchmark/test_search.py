"""What the benchmark of the search times, says and refuses."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from memorizing.benchmark import Recording, SearchShape, benchmark_search, choose_shape
from memorizing.benchmark.search import _draw
from memorizing.errors import ConfigError

SHAPE = SearchShape(num_heads=2, num_queries=19, head_dim=13, num_neighbors=3)


def test_every_row_names_what_it_is_compared_with(recording: Recording) -> None:
    pytest.importorskip("faiss")
    calls: list[tuple[int, int]] = []
    result = benchmark_search(
        (53, 97),
        ["exact"],
        shape=SHAPE,
        recording=recording,
        num_pairs=2,
        num_warmup=1,
        on_progress=lambda done, total: calls.append((done, total)),
    )
    assert calls == [(n, 2 * 2 * 3) for n in range(1, 13)]
    expected = [("product", "product")]
    expected += [("exact", "product"), ("exact", "topk"), ("exact", "faiss_knn")]
    expected += [("topk", "product"), ("faiss_knn", "product")]
    for data in ("random", "recorded"):
        for size in (53, 97):
            rows = [r for r in result["rows"] if (r["data"], r["entries"]) == (data, size)]
            assert [(row["name"], row["compared_with"]) for row in rows] == expected
            for row in rows:
                assert row["ratio"] > 0
                assert row["queries_per_second"] == pytest.approx(2 * 19 / row["seconds"])
                assert 1 <= row["num_pairs"] <= 2
            recall = {row["name"]: row["recall"] for row in rows}
            assert recall["product"] is None
            assert recall["faiss_knn"] == recall["exact"] == 1
    assert result["unavailable"] == {}
    assert result["recording"] == recording.source
    assert {"processor", "cores", "threads", "versions", "commit", "shape"} <= set(result)


def test_the_newest_keys_and_the_first_queries_after_them_are_searched(
    recording: Recording,
) -> None:
    keys, queries, others = _draw(SHAPE, 53, recording)
    assert torch.equal(keys, recording.keys[:, 48:])
    assert torch.equal(queries, recording.queries[:, :19])
    assert torch.equal(others, recording.queries[:, 19:])


def test_random_vectors_have_the_length_1_and_the_shape_asked_for() -> None:
    keys, queries, others = _draw(SHAPE, 53, None)
    assert (queries.shape, keys.shape) == ((2, 19, 13), (2, 53, 13))
    assert not bool((queries == others).all(-1).any())
    for vectors in (queries, keys, others):
        assert vectors.dtype == torch.bfloat16
        lengths = vectors.float().norm(dim=-1)
        torch.testing.assert_close(lengths, torch.ones_like(lengths), rtol=0, atol=1e-2)


def test_the_shape_is_the_papers_unless_a_recording_or_the_caller_says_otherwise(
    recording: Recording,
) -> None:
    assert choose_shape(None) == SearchShape(8, 512, 128, 32)
    assert choose_shape(None, num_heads=None, head_dim=7) == SearchShape(8, 512, 7, 32)
    assert choose_shape(recording, num_neighbors=5) == SearchShape(2, 23, 13, 5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"entries": (53, 2)}, "at least the 3 neighbors"),
        ({"entries": ()}, "at least the 3 neighbors"),
        ({"indexes": ()}, "at least one, and each once"),
        ({"indexes": ("exact", "exact:rescore=true")}, "at least one, and each once"),
        ({"indexes": ("exat",)}, "did you mean 'exact'"),
        ({"num_pairs": 0}, "num_pairs is 0; allowed: 1 or more"),
        ({"use_random": False}, "give a recording, or use random keys"),
    ],
)
def test_what_cannot_be_searched_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        benchmark_search(**{"entries": (53,), "shape": SHAPE, **settings})


@pytest.mark.parametrize(
    ("entries", "shape", "message"),
    [
        (102, SearchShape(2, 19, 13, 3), "record more, or search fewer"),
        (53, SearchShape(2, 24, 13, 3), "record more, or search fewer"),
        (53, SearchShape(3, 19, 13, 3), "2 heads of 13 dimensions and the search 3 of 13"),
        (53, SearchShape(2, 19, 11, 3), "2 heads of 13 dimensions and the search 2 of 11"),
    ],
)
def test_a_search_that_the_recording_does_not_hold_is_refused(
    recording: Recording, entries: int, shape: SearchShape, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        benchmark_search((entries,), shape=shape, recording=recording)


def test_a_count_below_1_is_refused() -> None:
    with pytest.raises(ConfigError, match="num_heads is 0; allowed: 1 or more"):
        SearchShape(num_heads=0)
