"""How much training the paper's recipe takes until memory helps, and what of ours takes less."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
from comparing import compare
from formatting import MISSING, format_change, format_percent, format_tokens, make_table
from pictures import draw, show_percents, start_figure
from results import Results, Run
from section import Section, describe_sources, show_picture

from sections.learning import Curve, read_curve

_TITLE = "The paper's recipe against the amount of training"
_PICTURE = "results_amounts.png"
_ARMS = {
    "paper": "Adafactor, single tokens (the paper's)",
    "paper-mixed": "Adafactor, four tokens mixed",
    "paper-mixed-induced": "Adafactor, four tokens mixed, induction start",
    "muon": "Muon, single tokens",
    "muon-mixed": "Muon, four tokens mixed",
    "muon-mixed-induced": "Muon, four tokens mixed, induction start (ours)",
}
_COLORS = {"paper": "#8a8a8a", "muon": "#00798c"}
_STYLES = ("-", "--", ":")
"""None, one and both of what comes with an optimizer."""
_TOKENS = (1e6, 2e6, 4e6, 8e6, 16e6)
"""Columns, at the nearest evaluation."""


def covers(run: Run) -> bool:
    """Whether this section shows a run."""
    return run.experiment == "amounts"


def write(results: Results) -> Section:
    """The gain of every arm at some amounts of training, and where it would begin."""
    runs = [run for run in results.runs if covers(run)]
    parts = [
        "By the paper's recipe, two million tokens do not teach a model to use its memory "
        "(section 4). Here the demo's model (3 layers, d = 128, segments of 256, memory of 8,192 "
        "in layer 1) is trained on eight times as many, by the paper's recipe with its own warm-up "
        "of 1,000 steps, and with what ours adds to it: Muon with its rates and schedule, queries "
        "and keys mixed over several tokens, induction start. Change of perplexity by memory "
        "against the same recipe without it, on the beginnings of the validation documents while "
        "training, and on the test documents at its end.",
        describe_sources(runs, "python experiments/queue --run amounts/"),
    ]
    curves = {arm: _read(results, arm) for arm in _ARMS}
    found = {arm: curve for arm, curve in curves.items() if curve is not None}
    if not found:
        return Section(_TITLE, tuple(parts))
    parts += [
        _make_table(results, found),
        _describe_beginning(found),
        show_picture(_PICTURE, "Change of perplexity by memory against training tokens, by recipe"),
    ]
    return Section(_TITLE, tuple(parts), {_PICTURE: _plot(found)})


def _read(results: Results, arm: str) -> Curve | None:
    return read_curve(results.find("amounts", arm), results.find("amounts", f"{arm}-cache"))


def _make_table(results: Results, curves: Mapping[str, Curve]) -> str:
    rows = []
    for arm, about in _ARMS.items():
        curve = curves.get(arm)
        cells = [MISSING] * len(_TOKENS)
        if curve is not None:
            places = [int(np.abs(curve.tokens - wanted).argmin()) for wanted in _TOKENS]
            cells = [format_percent(float(curve.change[place])) for place in places]
        memory, cache = (results.find("amounts", a) for a in (arm, f"{arm}-cache"))
        rows.append((about, *cells, format_change(compare(memory, "8192", cache, "0"))))
    header = ("recipe", *(format_tokens(int(t)) for t in _TOKENS), "test, at the end (95%)")
    return make_table(header, rows)


def find_beginning(curve: Curve) -> float | None:
    """Training tokens from which on memory lowers perplexity; None where it does not at the end.

    Between two evaluations, their changes are interpolated over the logarithm of the tokens.
    """
    change = curve.change
    if change[-1] >= 0:
        return None
    last = max((place for place, value in enumerate(change) if value >= 0), default=-1)
    if last < 0:
        return float(curve.tokens[0])
    share = change[last] / (change[last] - change[last + 1])
    low, high = np.log(curve.tokens[last : last + 2])
    return math.exp(low + share * (high - low))


def fit_slope(curve: Curve) -> float:
    """Change of perplexity by memory for each doubling of the tokens, over the second half.

    Least squares of the change over the logarithm of the tokens.
    """
    half = len(curve.tokens) // 2
    slope, _ = np.polyfit(np.log2(curve.tokens[half:]), curve.change[half:], 1)
    return float(slope)


def _describe_beginning(curves: Mapping[str, Curve]) -> str:
    sentences = []
    for arm, curve in curves.items():
        begins = find_beginning(curve)
        name = _ARMS[arm]
        if begins is None:
            text = f"{name}: not by {format_tokens(int(curve.tokens[-1]))}"
        elif begins <= curve.tokens[0]:
            text = f"{name}: at the first evaluation"
        else:
            text = f"{name}: at {format_tokens(round(begins))}"
        if len(curve.tokens) > 3:
            text += f", {format_percent(fit_slope(curve))} a doubling in the second half"
        sentences.append(text)
    return f"Where memory begins to lower perplexity for good: {'; '.join(sentences)}."


@draw
def _plot(curves: Mapping[str, Curve]):
    figure, grid = start_figure(9.0, 3.6)
    axes = grid[0, 0]
    for arm, curve in curves.items():
        color, style = _COLORS[arm.partition("-")[0]], _STYLES[arm.count("-")]
        axes.plot(
            curve.tokens / 1e6, 100 * curve.change, style, color=color, marker="o", markersize=3,
            label=_ARMS[arm],
        )  # fmt: skip
    axes.axhline(0, color="#555555", linewidth=1)
    axes.set_xscale("log", base=2)
    ticks = [tokens / 1e6 for tokens in _TOKENS]
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.set_xlabel("training tokens, millions")
    axes.set_ylabel("change of validation perplexity by memory")
    show_percents(axes.yaxis)
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    return figure
