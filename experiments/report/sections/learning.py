"""The gain against training tokens."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from formatting import format_percent, format_tokens, make_table
from pictures import CACHE, COLORS, draw, show_numbers, show_percents, start_figure
from results import FAMILIES, Results, Run, Seeds
from section import Section, describe_sources, show_picture

_PICTURE = "results_learning.png"
_SHARES = (0.25, 0.5, 0.75, 1.0)
"""Of training, at the nearest evaluation."""


@dataclass(frozen=True)
class Curve:
    """A family's validation documents while training, by seed; arrays are of the same points."""

    tokens: np.ndarray
    """Trained on, mean of the seeds; in a seed both arms have as many."""
    memory: dict[int, np.ndarray]
    """Nats per token by seed."""
    cache: dict[int, np.ndarray]

    @property
    def changes(self) -> dict[int, np.ndarray]:
        """Relative change of perplexity at equal tokens, by seed."""
        return {seed: np.expm1(self.memory[seed] - self.cache[seed]) for seed in self.memory}

    @property
    def change(self) -> np.ndarray:
        """Over seeds, by the mean of their nats."""
        return np.expm1(np.mean([self.memory[s] - self.cache[s] for s in self.memory], axis=0))


def covers(run: Run) -> bool:
    """Its runs are those of the first section."""
    return False


def write(results: Results) -> Section:
    """The curves, and the change at each point."""
    curves = {
        family: read_curve(*(results.find("main", arm, family) for arm in ("memory", "cache")))
        for family in FAMILIES
    }
    found = {family: curve for family, curve in curves.items() if curve is not None}
    runs = [
        run
        for family, curve in found.items()
        for arm in ("memory", "cache")
        for run in results.find("main", arm, family).values()
        if run.seed in curve.memory
    ]
    parts = [
        "The beginnings of the validation documents, read by both arms of section 1 at the same "
        "points of training, the memory with 8,192 entries. They are short: a document's later "
        "tokens, which have more to retrieve, are in sections 1 and 2.",
        describe_sources(runs, "python experiments/queue --run main/", reads=False),
    ]
    if not found:
        return Section("Gain against training tokens", tuple(parts))
    parts += [
        _make_table(found),
        _summarize(found),
        show_picture(_PICTURE, "Validation perplexity of both arms and its change, by tokens"),
    ]
    return Section("Gain against training tokens", tuple(parts), {_PICTURE: _plot(found)})


def read_curve(memory: Seeds, cache: Seeds) -> Curve | None:
    """Both arms at the points that all of their seeds have; None without one."""
    points = {}
    for seed in memory.keys() & cache.keys():
        by_memory, by_cache = (_read_points(arm[seed]) for arm in (memory, cache))
        if shared := [place for place in by_memory if place in by_cache]:
            points[seed] = [(place[0], by_memory[place], by_cache[place]) for place in shared]
    if not points:
        return None
    # Seeds read documents in other orders, so that tails put their points some tokens apart.
    count = min(len(found) for found in points.values())
    values = {seed: np.array(points[seed][:count]) for seed in sorted(points)}
    return Curve(
        np.mean([found[:, 0] for found in values.values()], axis=0),
        {seed: found[:, 1] for seed, found in values.items()},
        {seed: found[:, 2] for seed, found in values.items()},
    )


def _read_points(run: Run) -> dict[tuple[int, int], float]:
    """Nats per token by training tokens and by validation tokens: only like is compared."""
    return {
        (point["tokens"], point["validation_tokens"]): point["nats_per_token"]
        for point in run.validation
    }


def _make_table(curves: Mapping[str, Curve]) -> str:
    rows = []
    for family, curve in curves.items():
        cells = [format_tokens(round(curve.tokens[-1]))]
        for share in _SHARES:
            place = int(np.abs(curve.tokens - share * curve.tokens[-1]).argmin())
            cells.append(format_percent(float(curve.change[place])))
        rows.append((family, *cells))
    header = ("family", "training tokens", *(f"after {share:.0%}" for share in _SHARES))
    return make_table(header, rows)


def _summarize(curves: Mapping[str, Curve]) -> str:
    found = {family: curve for family, curve in curves.items() if len(curve.tokens) > 1}
    if not found:
        return ""
    sentences = []
    for family, curve in found.items():
        middle = int(np.abs(curve.tokens - curve.tokens[-1] / 2).argmin())
        before, after = float(curve.change[middle]), float(curve.change[-1])
        first, last = format_percent(before), format_percent(after)
        verb = "grows" if abs(after) > abs(before) else "shrinks"
        moved = f"stays at {last}" if first == last else f"{verb}, from {first} to {last}"
        sentences.append(f"on {family} the change {moved}")
    return f"From the middle of training to its end: {'; '.join(sentences)}."


@draw
def _plot(curves: Mapping[str, Curve]):
    count = len(curves)
    figure, grid = start_figure(
        max(4.0, 0.5 + 2.15 * count), 4.6, count, 2, sharex="col", height_ratios=(1.25, 1)
    )
    for column, (family, curve) in enumerate(curves.items()):
        upper, lower = grid[:, column]
        color, millions = COLORS[family], curve.tokens / 1e6
        for seed in curve.memory:
            is_first = column == 0 and seed == min(curve.memory)
            upper.plot(
                millions, np.exp(curve.cache[seed]), color=CACHE, linewidth=1.4,
                label="cache alone" if is_first else None,
            )  # fmt: skip
            upper.plot(millions, np.exp(curve.memory[seed]), color=color, linewidth=1.4)
            if len(curve.memory) > 1:
                lower.plot(
                    millions, 100 * curve.changes[seed], color=color, linewidth=0.8, alpha=0.5
                )
        lower.plot(millions, 100 * curve.change, "o-", color=color, markersize=4)
        lower.axhline(0, color="#555555", linewidth=1)
        upper.set_yscale("log")
        show_numbers(upper.yaxis)
        upper.set_title(family, color=color, fontweight="bold")
        lower.set_xlim(left=0)
    changes = np.concatenate([c for curve in curves.values() for c in curve.changes.values()])
    span = max(changes.max(), 0) - min(changes.min(), 0)
    for lower in grid[1]:
        lower.set_ylim(
            100 * (min(changes.min(), 0) - 0.08 * span), 100 * (max(changes.max(), 0) + 0.08 * span)
        )
        show_percents(lower.yaxis)
        if lower is not grid[1, 0]:
            lower.tick_params(labelleft=False)
    grid[0, 0].set_ylabel("validation perplexity")
    grid[1, 0].set_ylabel("change by memory")
    figure.supxlabel("training tokens, millions", fontsize=9, color="#333333")
    grid[0, 0].plot([], [], color=COLORS[next(iter(curves))], linewidth=1.4, label="with memory")
    grid[0, 0].legend(loc="upper right", handlelength=1.4)
    return figure
