"""The lengths of documents as a picture."""

import pytest

from memorizing.analysis import plot_lengths
from memorizing.config import DataConfig
from memorizing.data import load_corpus, measure_corpus


def test_the_lengths_are_drawn(tokenizer, tmp_path):
    pytest.importorskip("matplotlib")
    for name, length in (("a", 1), ("b", 7), ("c", 41)):
        (tmp_path / name).write_text("ant " * length)
    corpus = load_corpus(DataConfig(corpus=f"files:{tmp_path}"))
    path = plot_lengths(measure_corpus(corpus, tokenizer), tmp_path / "deep" / "lengths.png")
    assert path.read_bytes().startswith(b"\x89PNG")
    assert [one.name for one in path.parent.iterdir()] == ["lengths.png"]
