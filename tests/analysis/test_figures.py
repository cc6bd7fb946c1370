"""A figure that cannot be made or written is one clear error."""

import sys

import pytest

from memorizing.analysis import plot_capacities
from memorizing.errors import IndexUnavailableError, ResourceError


def test_without_matplotlib_the_install_command_is_said(make_result, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(IndexUnavailableError, match=r'pip install "memorizing\[plots\]"'):
        plot_capacities({"512": make_result([1.0])}, tmp_path / "a.png")


def test_a_picture_that_cannot_be_written_is_one_clear_error(make_result, tmp_path):
    pytest.importorskip("matplotlib")
    (tmp_path / "file").write_text("")
    with pytest.raises(ResourceError, match="choose another folder"):
        plot_capacities({"512": make_result([1.0])}, tmp_path / "file" / "a.png")
