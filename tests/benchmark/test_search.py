"""What the benchmark of the search times, says and refuses."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from memorizing.benchmark import Recording, SearchShape, benchmark_search, choose_shape
from memorizing.benchmark.plots import plot_search
from memorizing.benchmark.search import _draw
from memorizing.errors import ConfigError, IndexUnavailableError

SHAPE = SearchShape(num_heads=2, num_queries=19, head_dim=13, num_neighbors=3)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def recording() -> Recording:
    generator = torch.Generator().manual_seed(1)
    keys = torch.randn(2, 101, 13, generator=generator).bfloat16()
    queries = torch.randn(2, 23, 13, generator=generator).bfloat16()
    return Recording(keys, queries, {"run": "runs/small", "layer": 1})


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


def make_result(num_rows: int) -> dict[str, Any]:
    rows = [
        {
            "name": name,
            "data": "random",
            "entries": 53,
            "compared_with": "product",
            "recall": recall,
            "queries_per_second": 1e5 / (place + 1),
            "settings": settings,
        }
        for place, (name, recall, settings) in enumerate(
            [
                ("product", None, {}),
                ("exact", 1.0, {"index": "exact"}),
                ("topk", 1.0, {}),
                ("faiss_ivf:num_probes=32,num_lists=64", 0.31, {"index": "faiss_ivf"}),
            ]
        )
    ]
    return {
        "rows": rows[:num_rows],
        "processor": "a processor",
        "threads": 2,
        "shape": {"num_heads": 2, "num_queries": 19, "head_dim": 13, "num_neighbors": 3},
    }


def test_the_picture_is_a_png_and_nothing_is_left_beside_it(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    path = plot_search(make_result(4), tmp_path / "plots" / "search.png")
    assert path.read_bytes().startswith(b"\x89PNG\r\n")
    assert [p.name for p in path.parent.iterdir()] == ["search.png"]


def test_without_a_row_there_is_nothing_to_plot(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    with pytest.raises(ConfigError, match="no row to plot"):
        plot_search(make_result(0), tmp_path / "search.png")


def test_without_matplotlib_the_install_command_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(IndexUnavailableError, match=r'pip install "memorizing\[plots\]"'):
        plot_search(make_result(4), tmp_path / "search.png")
