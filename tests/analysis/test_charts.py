"""Charts of pages."""

import pytest

from memorizing.analysis.charts import draw_lines


@pytest.mark.parametrize(
    "name", ["layer 18, head {}", "{}", "runs/WWWWWWWWWWWW{}", "W" * 99 + "{}"]
)
def test_all_names_of_lines_are_in_the_picture(name):
    lines = {name.format(number): ([0, 1], [number, 1]) for number in range(11)}
    figure = draw_lines(lines, "x", "y")
    figure.draw_without_rendering()
    (axes,) = figure.axes
    legend = axes.get_legend()
    assert len(legend.get_texts()) == 11
    for text in legend.get_texts():
        box = text.get_window_extent()
        assert 0 <= box.x0 < box.x1 <= figure.bbox.width
        assert 0 <= box.y0 < box.y1 <= figure.bbox.height
    # The lines have room too.
    assert axes.get_window_extent().width > 0.6 * figure.bbox.width
