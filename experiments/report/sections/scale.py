"""Figure 1: models of several sizes, with and without memory."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from comparing import check_same_documents, compare, measure
from formatting import format_change, format_number, make_table
from paper import TIMES_LARGER
from pictures import CACHE, LARGE_MEMORY, MEMORY, draw, show_numbers, start_figure
from results import Results, Run, Seeds
from section import Section, describe_sources, show_picture

_PICTURE = "results_scale.png"
SIZES: dict[str, tuple[tuple[str, str], tuple[str, str]]] = {
    "small": (("sizes", "small-cache"), ("sizes", "small-memory")),
    "medium": (("table4", "ours-512-xl"), ("table4", "ours-512-8192-xl")),
    "large": (("sizes", "large-cache"), ("sizes", "large-memory")),
}
"""Experiment and arm without memory and with."""
_CAPACITIES = (8192, 65_536)


@dataclass(frozen=True)
class Point:
    """A model's size and perplexity."""

    weights: int
    perplexity: float


def covers(run: Run) -> bool:
    """Whether this section shows a run (table 4 has the medium size)."""
    arms = [place for places in SIZES.values() for place in places]
    return (
        run.experiment == "sizes" and run.family == "proofs" and (run.experiment, run.arm) in arms
    )


def write(results: Results) -> Section:
    """The table, the plot, and how much larger a model without memory must be."""
    found = {size: [results.find(*place) for place in places] for size, places in SIZES.items()}
    runs = [run for arms in found.values() for arm in arms for run in arm.values()]
    parts = [
        "Three sizes of the same model on proofs, with as many training tokens each (the medium "
        "size is that of Table 4): how many times more weights does a model without memory "
        "need to equal one with memory? Between two sizes nats are interpolated over the "
        "logarithm of the number of weights. Weights include the embedding.",
        describe_sources(runs, "python experiments/queue --run sizes/ table4/proofs-ours-512"),
    ]
    title = "Figure 1: memory against more weights"
    if not runs:
        return Section(title, tuple(parts))
    check_same_documents(
        *((arm, str(c)) for arms in found.values() for arm in arms for c in (0, *_CAPACITIES))
    )
    lines = {0: _read_points(found, 0)} | {c: _read_points(found, c) for c in _CAPACITIES}
    parts += [
        _make_table(found, lines),
        "A row's last columns say how many times as many weights the cache alone needs to equal "
        f"it (paper: {TIMES_LARGER} times, with 8,192 entries). *Above* and *below* mean outside "
        "of the sizes measured: nothing is extrapolated.",
    ]
    pictures = {}
    if sum(len(points) for points in lines.values()) > 1:
        pictures[_PICTURE] = _plot({c: list(points.values()) for c, points in lines.items()})
        parts.append(show_picture(_PICTURE, "Perplexity against weights, with and without memory"))
    return Section(title, tuple(parts), pictures)


def _read_points(found: Mapping[str, Sequence[Seeds]], capacity: int) -> dict[str, Point]:
    points = {}
    for size, (cache, memory) in found.items():
        arm = memory if capacity else cache
        perplexity = measure(arm, str(capacity))
        if perplexity is not None:
            points[size] = Point(next(iter(arm.values())).num_weights, perplexity)
    return points


def describe_equal_size(point: Point, baseline: Sequence[Point]) -> str:
    """How many times as many weights a baseline needs for a point's perplexity.

    Args:
        point: of the model with memory.
        baseline: models without, of rising size.
    """
    line = sorted(baseline, key=lambda p: p.weights)
    if len(line) < 2:
        return ""
    if point.perplexity > line[0].perplexity:
        return f"below {line[0].weights / point.weights:.1f}"
    for small, large in zip(line, line[1:], strict=False):
        if small.perplexity >= point.perplexity >= large.perplexity:
            span = math.log(small.perplexity / large.perplexity)
            way = math.log(small.perplexity / point.perplexity) / span if span else 0.0
            weights = small.weights * (large.weights / small.weights) ** way
            return f"{weights / point.weights:.1f}"
    return f"above {line[-1].weights / point.weights:.1f}"


def _make_table(
    found: Mapping[str, Sequence[Seeds]], lines: Mapping[int, Mapping[str, Point]]
) -> str:
    baseline = list(lines[0].values())
    rows = []
    for size, (cache, memory) in found.items():
        points = [lines[capacity].get(size) for capacity in (0, *_CAPACITIES)]
        weights = next((p.weights for p in points if p is not None), None)
        changes = [compare(memory, str(c), cache, "0") for c in _CAPACITIES]
        cells = [size, format_number(None) if weights is None else f"{weights / 1e6:.2f}M"]
        cells += [format_number(None if p is None else p.perplexity) for p in points]
        cells += [format_change(change) for change in changes]
        cells += ["" if p is None else describe_equal_size(p, baseline) for p in points[1:]]
        rows.append(cells)
    named = [f"{capacity:,}" for capacity in _CAPACITIES]
    header = (
        "size", "weights", "cache alone", *named, *(f"change, {name}" for name in named),
        *(f"times, {name}" for name in named),
    )  # fmt: skip
    return make_table(header, rows)


@draw
def _plot(lines: Mapping[int, Sequence[Point]]):
    figure, ((axes,),) = start_figure(6.4, 3.8)
    colors = dict(zip(lines, (CACHE, MEMORY, LARGE_MEMORY), strict=True))
    for capacity, points in lines.items():
        if points:
            axes.plot(
                [p.weights / 1e6 for p in points], [p.perplexity for p in points], "o-",
                color=colors[capacity],
                label=f"memory of {capacity:,}" if capacity else "cache alone",
            )  # fmt: skip
    axes.set_xscale("log")
    axes.set_yscale("log")
    weights = sorted({round(p.weights / 1e6, 2) for points in lines.values() for p in points})
    show_numbers(axes.xaxis, weights)
    show_numbers(axes.yaxis)
    axes.margins(x=0.08, y=0.1)
    axes.set_xlabel("weights, millions (log scale)")
    axes.set_ylabel("perplexity (log scale)")
    axes.legend(loc="upper right")
    return figure
