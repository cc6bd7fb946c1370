"""Recall against queries per second, as a picture (the axes are those of ann-benchmarks)."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from memorizing.analysis.plots import make_figure, save_figure
from memorizing.errors import ConfigError

_RECALL_OFFSET = 3e-3
"""Recall is drawn as -log10(1 - recall + this): each nine the same width, and 1 not infinitely
far."""
_TICKS = (0.0, 0.5, 0.8, 0.9, 0.95, 0.99, 1.0)
_FEWER_TICKS = (0.0, 0.5, 0.8, 0.95, 0.99, 1.0)
"""Where recall below 0.5 has to be shown too."""
_COLORS = (
    "#00798c",
    "#8d6a9f",
    "#c77d0a",
    "#2e933c",
    "#3066be",
    "#8c564b",
    "#66717e",
    "#b5179e",
    "#6a994e",
    "#457b9d",
)
_EXACT_COLOR = "#d1495b"
_BASE_COLOR = "#333333"
_LABEL_CHARACTERS = 24


def plot_search(result: Mapping[str, Any], path: str | Path) -> Path:
    """Write a PNG of what `benchmark_search` returned: a panel per kind of keys and size.

    Up and right is better. Exact search is a star, what it is compared with are squares, and the
    speed of the bare product is a dashed line.

    Args:
        result: with `rows`.
        path: of the picture; its folder is made where missing.

    Raises:
        IndexUnavailableError: matplotlib is not installed.
        ConfigError: there is no row.
        ResourceError: the file cannot be written.
    """
    figure = make_figure(1.0, 1.0)  # its size follows from the rows
    rows = [row for row in result["rows"] if row["compared_with"] == "product"]
    if not rows:
        raise ConfigError("there is no row to plot; search at least one memory")
    kinds = list(dict.fromkeys(row["data"] for row in rows))
    sizes = list(dict.fromkeys(row["entries"] for row in rows))
    names = list(dict.fromkeys(row["name"] for row in rows if row["settings"]))
    colors = dict(zip(names, _COLORS * len(names), strict=False))
    width, height = 1.2 + 4.6 * len(sizes), 0.9 + 3.9 * len(kinds)
    figure.set_size_inches(width, height)
    panels = figure.subplots(len(kinds), len(sizes), squeeze=False, sharex=True)
    for line, kind in enumerate(kinds):
        for column, size in enumerate(sizes):
            chosen = [row for row in rows if (row["data"], row["entries"]) == (kind, size)]
            axes = panels[line, column]
            _draw_panel(axes, chosen, colors)
            axes.set_title(f"{kind} keys, {size:,} entries", loc="left", fontsize=10)
    worst = min(row["recall"] for row in rows if row["recall"] is not None)
    _scale_recall(panels.flat, worst)
    shape = result["shape"]
    figure.supxlabel(f"recall of the {shape['num_neighbors']} nearest", fontsize=10)
    figure.supylabel("queries per second (log scale)", fontsize=10)
    figure.suptitle(
        f"{result['processor']}, threads: {result['threads']}; {shape['num_heads']} heads x "
        f"{shape['num_queries']:,} queries x {shape['head_dim']} dimensions",
        fontsize=9,
        color="#555555",
    )
    return save_figure(figure, path)


def _draw_panel(axes: Any, rows: Sequence[Mapping[str, Any]], colors: Mapping[str, str]) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    for row in rows:
        speed = row["queries_per_second"]
        if row["recall"] is None:
            axes.axhline(
                speed, color=_BASE_COLOR, linewidth=1, linestyle="--", label="product alone"
            )
            continue
        is_base, is_exact = not row["settings"], row["settings"].get("index") == "exact"
        color = _BASE_COLOR if is_base else _EXACT_COLOR if is_exact else colors[row["name"]]
        base_marker = "s" if row["name"] == "topk" else "D"
        marker, area = (base_marker, 26) if is_base else ("*", 130) if is_exact else ("o", 34)
        axes.scatter(
            [row["recall"]],
            [speed],
            s=area,
            c=color,
            marker=marker,
            zorder=3,
            clip_on=False,
            label=textwrap.fill(row["name"].replace(",", ", "), _LABEL_CHARACTERS),
        )
    axes.set_yscale("log")
    speeds = [row["queries_per_second"] for row in rows]
    low, high = np.log10(min(speeds)), np.log10(max(speeds))
    margin = 0.12 * max(high - low, 0.5)
    low, high = low - margin, high + margin
    axes.set_ylim(10**low, 10**high)
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda speed, _: f"{speed:,.0f}"))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.tick_params(labelsize=8.5)
    axes.grid(color="#e6e6e6", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(loc="center left", bbox_to_anchor=(1.02, 0.5), fontsize=7.5, frameon=False)


def _scale_recall(panels: Any, worst: float) -> None:
    from matplotlib.ticker import NullLocator

    every = _TICKS if worst >= 0.5 else _FEWER_TICKS
    left = max((tick for tick in every if tick < worst), default=0.0)
    ticks = [tick for tick in every if tick >= left]
    for axes in panels:
        axes.set_xscale(
            "function",
            functions=(
                lambda recall: -np.log10(np.maximum(1 - recall, 0) + _RECALL_OFFSET),
                lambda place: 1 + _RECALL_OFFSET - 10**-place,
            ),
        )
        axes.set_xlim(left - 1e-6, 1 + 2e-4)
        axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        axes.xaxis.set_minor_locator(NullLocator())
