"""The picture of a search has everything in it, or there is a clear refusal."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from memorizing.benchmark.plots import plot_search
from memorizing.errors import ConfigError, IndexUnavailableError


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
