"""The plot is a picture with everything in it, or a clear refusal."""

import pytest

from memorizing.analysis import plot_capacities
from memorizing.errors import ConfigError


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
