"""A plot is a picture with everything in it, or a clear refusal."""

import sys

import pytest

from memorizing.analysis import plot_capacities, plot_lengths
from memorizing.config import DataConfig
from memorizing.data import load_corpus, measure_corpus
from memorizing.errors import ConfigError, IndexUnavailableError, ResourceError


def test_the_picture_is_a_png_and_nothing_is_left_beside_it(make_result, tmp_path):
    pytest.importorskip("matplotlib")
    results = {
        str(c): make_result([3.0 - 0.1 * i] * 700, capacity=c)
        for i, c in enumerate((0, 512, 2048, 8192))
    }
    results["off"] = make_result([3.0] * 700, capacity=0, control="off")
    path = plot_capacities(
        results, tmp_path / "plots" / "capacity.png", baseline=make_result([2.9] * 700)
    )
    assert path.read_bytes().startswith(b"\x89PNG\r\n")
    assert [p.name for p in path.parent.iterdir()] == ["capacity.png"]


def test_without_a_capacity_there_is_nothing_to_plot(make_result, tmp_path):
    pytest.importorskip("matplotlib")
    with pytest.raises(ConfigError, match="above 0"):
        plot_capacities({"0": make_result([1.0], capacity=0)}, tmp_path / "a.png")
    assert list(tmp_path.iterdir()) == []


def test_without_matplotlib_the_install_command_is_said(make_result, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(IndexUnavailableError, match=r'pip install "memorizing\[plots\]"'):
        plot_capacities({"512": make_result([1.0])}, tmp_path / "a.png")


def test_a_picture_that_cannot_be_written_is_one_clear_error(make_result, tmp_path):
    pytest.importorskip("matplotlib")
    (tmp_path / "file").write_text("")
    with pytest.raises(ResourceError, match="choose another folder"):
        plot_capacities({"512": make_result([1.0])}, tmp_path / "file" / "a.png")


def test_the_lengths_are_drawn(tokenizer, tmp_path):
    pytest.importorskip("matplotlib")
    for name, length in (("a", 1), ("b", 7), ("c", 41)):
        (tmp_path / name).write_text("ant " * length)
    corpus = load_corpus(DataConfig(corpus=f"files:{tmp_path}"))
    path = plot_lengths(measure_corpus(corpus, tokenizer), tmp_path / "deep" / "lengths.png")
    assert path.read_bytes().startswith(b"\x89PNG")
    assert [one.name for one in path.parent.iterdir()] == ["lengths.png"]
