"""Charts of pages: SVG of matplotlib in the colors of the page, light and dark, or for a paper."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from memorizing.analysis.plots import make_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, MUTED, LINE = "#1d1f21", "#63676c", "#dedbd5"
SERIES = ("#00798c", "#c8403f", "#b07c00", "#7d5ba6", "#4f7d2f", "#66717e")
_VARIABLES = {INK: "--ink", MUTED: "--muted", LINE: "--line"} | {
    color: f"--c{number}" for number, color in enumerate(SERIES, start=1)
}
"""Colors of a figure, and the page's names for them: there they follow its light and dark."""
_MOST_POINTS = 300
"""Of a line."""
_LEGEND_SHARE = 0.85
"""Of a figure's width, which a legend may take: browsers write wider letters."""
_NAME_LEN = 40
"""Of a name, its last characters are shown."""


def start_axes(width: float = 6.0, height: float = 2.6) -> tuple[Figure, Axes]:
    """Axes in the colors of a page.

    Raises:
        IndexUnavailableError: matplotlib is not installed.
    """
    figure = make_figure(width, height)
    axes = figure.subplots()
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(LINE)
    axes.tick_params(colors=MUTED, labelsize=8)
    axes.grid(axis="y", color=LINE, linewidth=0.6)
    axes.set_axisbelow(True)
    for label in (axes.xaxis.label, axes.yaxis.label):
        label.set(color=MUTED, fontsize=9)
    return figure, axes


def _add_legend(figure: Figure, axes: Axes) -> None:
    """Name the lines, above the axes, in as many columns as the figure has room for."""
    for num_columns in (4, 3, 2, 1):
        legend = axes.legend(
            loc="lower left", bbox_to_anchor=(0, 1), ncols=num_columns, frameon=False, fontsize=8,
            labelcolor=MUTED, borderaxespad=0,
        )  # fmt: skip
        if legend.get_window_extent().width <= _LEGEND_SHARE * figure.bbox.width:
            break


def encode_figure(figure: Figure, kind: str) -> bytes:
    """A figure as a file for a paper: `png` or `svg`."""
    import matplotlib

    file = io.BytesIO()
    # The same figure gives the same bytes.
    with matplotlib.rc_context({"svg.hashsalt": "memorizing"}):
        figure.savefig(file, format=kind, metadata={"Date": None} if kind == "svg" else None)
    return file.getvalue()


def embed_figure(figure: Figure, name: str) -> str:
    """A figure as SVG in a page: text stays text, sizes and colors are the page's.

    Args:
        figure: drawn in the colors of this module.
        name: of the figure, unique in the page.
    """
    import matplotlib

    file = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
    svg = file.getvalue()
    svg = svg[svg.index("<svg") :]
    tag, rest = svg.split(">", 1)
    tag = re.sub(r'\s(?:width|height)="[^"]*"', "", tag)
    svg = tag + ">" + re.sub(r"<metadata>.*?</metadata>", "", rest, flags=re.DOTALL)
    # Every figure calls its groups alike, and nothing refers to them.
    svg = re.sub(r'<g id="[^"]*"', "<g", svg)
    for color, variable in _VARIABLES.items():
        svg = svg.replace(color, f"var({variable})")
    return svg.replace("<svg", '<svg aria-hidden="true"', 1)


def draw_along(gains: NDArray[np.float32]) -> Figure:
    """Nats saved along a text: the mean of each of at most some hundred equal stretches."""
    figure, axes = start_axes(11.0, 2.3)
    edges = np.unique(np.linspace(0, len(gains), min(len(gains), _MOST_POINTS) + 1).astype(int))
    means = np.add.reduceat(gains.astype(np.float64), edges[:-1]) / np.diff(edges)
    for part, color in ((means.clip(min=0), SERIES[0]), (means.clip(max=0), SERIES[2])):
        axes.fill_between(edges, [*part, part[-1]], step="post", color=color, linewidth=0)
    axes.axhline(0, color=MUTED, linewidth=0.8)
    axes.set_xlim(0, len(gains))
    axes.set_xlabel("token")
    axes.set_ylabel("nats saved a token")
    axes.xaxis.set_major_formatter("{x:,.0f}")
    return figure


def draw_lines(
    lines: Mapping[str, tuple[Sequence[Any], Sequence[float]]],
    x_label: str,
    y_label: str,
    *,
    marker: str = "",
    is_log: bool = False,
) -> Figure:
    """Lines by name, each with its x and y; steps in thousands have separators.

    Args:
        lines: by name.
        x_label: below the axes.
        y_label: beside them.
        marker: of every point; none where points are many.
        is_log: x in powers of two.
    """
    figure, axes = start_axes(height=2.6 + 0.17 * len(lines))
    names = [name if len(name) <= _NAME_LEN else "…" + name[-_NAME_LEN:] for name in lines]
    for number, (name, (xs, ys)) in enumerate(zip(names, lines.values(), strict=True)):
        style = ("-", "--", ":", "-.")[number // len(SERIES) % 4]
        # What looks like a formula is a name.
        label = "".join(c if c.isprintable() else "?" for c in name).replace("$", r"\$")
        axes.plot(
            xs, ys, style, marker=marker, markersize=4, linewidth=1.6,
            color=SERIES[number % len(SERIES)], label=label,
        )  # fmt: skip
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    if is_log:
        axes.set_xscale("symlog", base=2, linthresh=256)
    if all(isinstance(x, str) for xs, _ in lines.values() for x in xs):
        axes.tick_params(axis="x", rotation=30)
    else:
        axes.xaxis.set_major_formatter("{x:,.0f}")
    _add_legend(figure, axes)
    return figure
