"""The style of all plots, and PNG files whose bytes depend on nothing but what is drawn."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable
from functools import wraps
from typing import Any

import numpy as np

from memorizing.errors import IndexUnavailableError

COLORS = {
    "proofs": "#00798c",
    "code": "#d1495b",
    "math": "#8d6a9f",
    "books": "#b87309",
    "web": "#3066be",
}
"""By family."""
MEMORY, CACHE, PAPER, FAINT = "#00798c", "#333333", "#8a8a8a", "#e6e6e6"
LARGE_MEMORY = "#d1495b"
_PALETTE = 128
"""Colors of a file."""

_STYLE: dict[Any, Any] = {
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.labelsize": 9,
    "axes.labelcolor": "#333333",
    "axes.edgecolor": "#999999",
    "axes.linewidth": 0.8,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.color": FAINT,
    "grid.linewidth": 0.8,
    "xtick.labelsize": 8.5,
    "ytick.labelsize": 8.5,
    "xtick.color": "#555555",
    "ytick.color": "#555555",
    "xtick.minor.size": 0,
    "ytick.minor.size": 0,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "lines.linewidth": 1.8,
    "lines.markersize": 5,
}


def draw(function: Callable[..., Any]) -> Callable[..., bytes]:
    """Call a function that returns a figure in the common style; its PNG.

    Raises:
        IndexUnavailableError: matplotlib is not installed.
    """

    @wraps(function)
    def draw_png(*arguments: Any) -> bytes:
        try:
            from matplotlib import rc_context
        except ImportError as error:
            raise IndexUnavailableError(
                'plots need matplotlib, which is not installed; pip install "memorizing[plots]"'
            ) from error
        with rc_context(_STYLE):
            figure = function(*arguments)
            picture = io.BytesIO()
            figure.savefig(picture, format="png")
        return _shrink(picture)

    return draw_png


def _shrink(picture: io.BytesIO) -> bytes:
    """A third of the bytes by a palette; without the name of the program that drew it."""
    from PIL import Image

    with Image.open(picture) as image:
        small = image.convert("RGB").quantize(_PALETTE, dither=Image.Dither.NONE)
    shrunk = io.BytesIO()
    small.save(shrunk, format="png", optimize=True)
    return shrunk.getvalue()


def start_figure(width: float, height: float, columns: int = 1, rows: int = 1, **options: Any):
    """A figure and its axes as an array of rows and columns; sizes in inches."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=144, layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False, **options)


def show_percents(axis: Any) -> None:
    """Ticks of an axis that holds relative changes in percent."""
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    axis.set_major_locator(MaxNLocator(6, steps=[1, 2, 2.5, 5, 10]))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:+g}%" if value else "0"))


def show_numbers(axis: Any, ticks: Iterable[float] | None = None) -> None:
    """Plain numbers on a logarithmic axis, at `ticks` or a few round places."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullLocator

    places = (
        LogLocator(subs=(1, 1.5, 2, 3, 4, 5, 6, 8)) if ticks is None else FixedLocator([*ticks])
    )
    axis.set_major_locator(places)
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))


def label_ends(axes: Any, labels: Iterable[tuple[str, float, float, str]]) -> None:
    """Names of lines right of their last points, moved apart where they would overlap.

    Args:
        axes: whose limits are final.
        labels: text, x and y of the last point, color.
    """
    found = sorted(labels, key=lambda label: label[2])
    if not found:
        return
    # Asking for limits brings the transformation up to date.
    axes.get_xlim()
    axes.get_ylim()
    to_axes = axes.transData + axes.transAxes.inverted()
    heights = [to_axes.transform((x, y))[1] for _, x, y, _ in found]
    for (text, _, _, color), height in zip(found, spread(heights, 0.065), strict=True):
        axes.annotate(
            text,
            (1.0, height),
            xycoords="axes fraction",
            xytext=(5, 0),
            textcoords="offset points",
            va="center",
            fontsize=8.5,
            color=color,
            annotation_clip=False,
        )


def spread(heights: list[float], gap: float) -> list[float]:
    """Rising heights moved as little as it takes that neighbors are `gap` apart."""
    groups = [[height, 1] for height in heights]  # mean of the wished places, how many
    done: list[list[float]] = []
    for group in groups:
        done.append([float(group[0]), group[1]])
        while len(done) > 1 and done[-1][0] - done[-2][0] < gap * (done[-1][1] + done[-2][1]) / 2:
            upper, lower = done.pop(), done.pop()
            count = upper[1] + lower[1]
            done.append([(upper[0] * upper[1] + lower[0] * lower[1]) / count, count])
    places: list[float] = []
    for middle, count in done:
        places += [middle + gap * (i - (count - 1) / 2) for i in range(int(count))]
    return [float(place) for place in np.array(places)]
