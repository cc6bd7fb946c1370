"""Pictures: perplexity against the capacity of the memory, and how long documents are.

Figures of matplotlib are made without its global state, and written whole.
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from memorizing.analysis.tables import name_result
from memorizing.errors import ConfigError, IndexUnavailableError
from memorizing.evaluation import EvaluationResult
from memorizing.storage.files import write_output

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from memorizing.data import CorpusStatistics

_MAIN_COLOR = "#00798c"
_LINE_COLORS = ("#d1495b", "#edae49", "#8d6a9f", "#66717e")


def plot_capacities(
    results: Mapping[str, EvaluationResult],
    path: str | Path,
    *,
    baseline: EvaluationResult | None = None,
    baseline_name: str = "cache only",
    title: str = "Perplexity against the size of the memory",
) -> Path:
    """Write a PNG: perplexity over capacity (log scale), controls and the baseline as lines.

    Args:
        results: as `evaluate_capacities` returns them.
        path: of the picture; its folder is made where missing.
        baseline: another run on the same documents.
        baseline_name: its name in the legend.
        title: above the picture.

    Raises:
        IndexUnavailableError: matplotlib is not installed.
        ConfigError: no result has a memory.
        ResourceError: the file cannot be written.
    """
    figure = make_figure(7.0, 4.4)
    # Only now: without matplotlib the line above has said what to install.
    from matplotlib.ticker import NullLocator

    curve = [r for r in results.values() if r.control is None and r.capacity]
    if not curve:
        raise ConfigError("there is no result with a memory to plot; evaluate a capacity above 0")
    capacities = [r.capacity for r in curve]
    axes = figure.subplots()
    if baseline is not None:
        axes.axhline(baseline.perplexity, color="#222222", linewidth=1.5, label=baseline_name)
    controls = [r for r in results.values() if r.control is not None or not r.capacity]
    drawn: set[float] = set()
    for result in controls:
        if result.perplexity in drawn:  # capacity 0 and the control `off` are the same
            continue
        color = _LINE_COLORS[len(drawn) % len(_LINE_COLORS)]
        drawn.add(result.perplexity)
        label = name_result(result)
        axes.axhline(result.perplexity, color=color, linewidth=1.2, linestyle="--", label=label)
    perplexities = [r.perplexity for r in curve]
    axes.plot(capacities, perplexities, "o-", color=_MAIN_COLOR, linewidth=2, label="with memory")
    for capacity, perplexity in zip(capacities, perplexities, strict=True):
        axes.annotate(
            f"{perplexity:.2f}",
            (capacity, perplexity),
            xytext=(0, -6),
            textcoords="offset points",
            ha="center",
            va="top",
            fontsize=8,
            color=_MAIN_COLOR,
        )
    longest = curve[0].longest
    if min(capacities) < longest < max(capacities):
        label = f"longest document: {longest:,} tokens"
        axes.axvline(longest, color="#999999", linewidth=1, linestyle=":", label=label)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xticks(capacities, [f"{capacity:,}" for capacity in capacities])
    axes.margins(y=0.12)
    axes.set_xlabel("entries in memory, per row and head (log scale)")
    axes.set_ylabel("perplexity per token")
    axes.set_title(title, loc="left", fontsize=11)
    axes.grid(axis="y", color="#e6e6e6", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=3, frameon=False, fontsize=8)
    return save_figure(figure, path)


def plot_lengths(statistics: CorpusStatistics, path: str | Path) -> Path:
    """Write a PNG with the number of documents by length in tokens, as the paper's appendix A.

    Args:
        statistics: what `measure_corpus` returned.
        path: of the picture; its folder is made where missing.

    Raises:
        IndexUnavailableError: matplotlib is not installed.
        ResourceError: the file cannot be written.
    """
    figure = make_figure(6.4, 3.6)
    axes = figure.subplots()
    begins = [max(item.begin, 0.5) for item in statistics.histogram]
    axes.bar(
        begins,
        [item.num_documents for item in statistics.histogram],
        width=[item.end - begin for item, begin in zip(statistics.histogram, begins, strict=True)],
        align="edge",
        color=_MAIN_COLOR,
        edgecolor="white",
    )
    axes.set_xscale("log", base=2)
    axes.set_xlabel("tokens per document (log scale)")
    axes.set_ylabel("documents")
    axes.set_title(
        f"{statistics.num_documents:,} documents, {statistics.num_tokens:,} tokens", loc="left"
    )
    axes.spines[["top", "right"]].set_visible(False)
    return save_figure(figure, path)


def make_figure(width: float, height: float) -> Figure:
    """An empty figure of so many inches.

    Raises:
        IndexUnavailableError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise IndexUnavailableError(
            'plots need matplotlib, which is not installed; pip install "memorizing[plots]"'
        ) from error
    return Figure(figsize=(width, height), dpi=150, layout="constrained")


def save_figure(figure: Figure, path: str | Path) -> Path:
    """Write a PNG; the folder is made where missing.

    Raises:
        ResourceError: the file cannot be written.
    """
    picture = io.BytesIO()
    figure.savefig(picture, format="png")
    write_output(Path(path), picture.getvalue())
    return Path(path)
