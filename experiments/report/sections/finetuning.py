"""Table 5 and Figure 6: on to a larger memory, and a memory for a model trained without."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from comparing import Share, compare, compute_share, measure
from formatting import (
    format_change,
    format_number,
    format_percent,
    format_share,
    make_table,
)
from paper import FINETUNED, GAP_CLOSED, PERPLEXITIES
from pictures import MEMORY, PAPER, draw, start_figure
from results import Results, Run, Seeds
from section import Section, describe_sources, show_picture

_PICTURE = "results_finetuning.png"
_TO_LARGER = ("memory-to-8192", "memory-to-65536")
_TO_MEMORY, _TO_CACHE = "cache-to-memory", "cache-to-cache"
_CAPACITIES = (8192, 65_536)


@dataclass(frozen=True)
class Closing:
    """The share of the gap closed while a model without memory is trained on with one."""

    tokens: list[int]
    shares: list[float]
    trained_tokens: int
    """Before."""


def covers(run: Run) -> bool:
    """Whether this section shows a run."""
    known = {"finetuning": (*_TO_LARGER, _TO_MEMORY, _TO_CACHE), "first": ("memory", "cache")}
    return run.family == "proofs" and run.arm in known.get(run.experiment, ())


def _find_tuned(results: Results) -> list[Run]:
    """What was trained on."""
    return [run for run in results.runs if covers(run) and run.experiment == "finetuning"]


def find_seed(results: Results) -> int | None:
    """Of the models that were trained on: that of most runs, the least of several; None without."""
    seeds = [run.seed for run in _find_tuned(results)]
    return min(seeds, key=lambda seed: (-seeds.count(seed), seed), default=None)


def write(results: Results) -> Section:
    """Both experiments."""
    seed = find_seed(results)
    runs = [run for run in _find_tuned(results) if run.seed == seed]
    parts = [
        f"Models of our first recipe (proofs{'' if seed is None else f', seed {seed}'}), trained "
        "on as many tokens as those of section 1, are trained on for some steps at a lower rate: "
        "the one with memory at 8,192 and at 65,536 entries (the paper's Table 5), the one without "
        "memory with a new one (the paper's Figure 6) and, to compare, without.",
        describe_sources(runs, "python experiments/queue --run finetuning/"),
    ]
    title = "Finetuning: a larger memory, and a memory for a model without"
    if seed is None:
        return Section(title, tuple(parts))
    found = _Tuned(results, seed)
    parts += [*_write_larger(found), *_write_shares(found)]
    closing = read_closing(results)
    pictures = {}
    if closing is not None:
        pictures[_PICTURE] = _plot(closing)
        parts.append(show_picture(_PICTURE, "Share of the gap closed against training"))
    return Section(title, tuple(parts), pictures)


@dataclass(frozen=True)
class _Tuned:
    """Runs of one seed: those trained on, and those they began with."""

    results: Results
    seed: int

    def find(self, experiment: str, arm: str) -> Seeds:
        """An arm's run; empty where it is not run yet."""
        arms = self.results.find(experiment, arm)
        return {self.seed: arms[self.seed]} if self.seed in arms else {}

    def read(self, experiment: str, arm: str, name: str) -> dict[str, Any] | None:
        """An evaluation of an arm's run; None where it is not run yet."""
        run = self.find(experiment, arm).get(self.seed)
        return run and run.evaluations.get(name)


def _write_larger(found: _Tuned) -> list[str]:
    start = found.find("first", "memory")
    rows = []
    for arm in _TO_LARGER:
        capacity = arm.rpartition("-")[2]
        after = found.find("finetuning", arm)
        change = compare(after, capacity, start, capacity)
        cells = (measure(start, capacity), measure(after, capacity))
        rows.append((f"{int(capacity):,}", *map(format_number, cells), format_change(change)))
    header = ("trained on with, and read with", "before", "after", "change (95%)")
    trained = PERPLEXITIES[512, 8192, True][0]
    reported = ", ".join(
        f"{perplexity:.2f} ({format_percent(perplexity / trained - 1)}) at {capacity:,}"
        for capacity, perplexity in FINETUNED.items()
    )
    return [
        "**To a larger memory.** The row of 8,192 entries shows what training on alone gives.",
        make_table(header, rows, num_text=0),
        f"The paper (arXiv Math, 20K steps, perplexity {trained:.2f} with 8,192 entries before): "
        f"{reported} entries; it reports no reading of the larger memory before.",
    ]


def _write_shares(found: _Tuned) -> list[str]:
    rows = []
    for capacity in _CAPACITIES:
        trained_on = ("finetuning", f"memory-to-{capacity}")
        shares = [
            _share(found, ("first", "cache"), ("first", "memory"), capacity),
            _share(found, ("finetuning", _TO_CACHE), trained_on, capacity),
        ]
        now, memory = (
            measure(found.find(*place), str(capacity))
            for place in (("finetuning", _TO_MEMORY), ("first", "memory"))
        )
        cells = (format_number(now), format_number(memory), *map(format_share, shares))
        rows.append((f"{capacity:,}", *cells))
    cache, more = (
        measure(found.find(*place), "0")
        for place in (("first", "cache"), ("finetuning", _TO_CACHE))
    )
    header = (
        "entries", "now", "trained with memory", "share closed (95%)",
        "share, all trained on (95%)",
    )  # fmt: skip
    return [
        "**A memory for a model trained without.** Share of the gap closed = (cache alone - "
        "now) / (cache alone - trained with memory), in nats of the test documents. The last "
        "column takes for both ends the models that were trained on as long: what more training "
        "gives without memory does not count there.",
        make_table(header, rows, num_text=0),
        f"The cache alone: {format_number(cache)} before, {format_number(more)} trained on "
        "without memory.",
    ]


def _share(
    found: _Tuned, start: tuple[str, str], end: tuple[str, str], capacity: int
) -> Share | None:
    readings = [
        found.read(*start, "0"),
        found.read("finetuning", _TO_MEMORY, str(capacity)),
        found.read(*end, str(capacity)),
    ]
    return None if None in readings else compute_share(*readings)  # type: ignore[arg-type]


def read_closing(results: Results) -> Closing | None:
    """The share by validation documents, against training tokens; None where a run is missing."""
    seed = find_seed(results)
    if seed is None:
        return None
    found = _Tuned(results, seed)
    places = (("first", "cache"), ("first", "memory"), ("finetuning", _TO_MEMORY))
    runs = [run for place in places for run in found.find(*place).values() if run.validation]
    if len(runs) < len(places):
        return None
    before, with_memory, now = runs
    cache, memory = before.validation[-1], with_memory.validation[-1]
    points = [
        point
        for point in now.validation
        if point["validation_tokens"] == cache["validation_tokens"] == memory["validation_tokens"]
    ]
    gap = cache["nats_per_token"] - memory["nats_per_token"]
    if not points or gap <= 0:
        return None
    shares = [(cache["nats_per_token"] - point["nats_per_token"]) / gap for point in points]
    return Closing([point["tokens"] for point in points], shares, before.tokens)


@draw
def _plot(closing: Closing):
    figure, ((axes,),) = start_figure(6.4, 3.5)
    percents = [100 * tokens / closing.trained_tokens for tokens in closing.tokens]
    shares = [100 * share for share in closing.shares]
    axes.plot(percents, shares, "o-", color=MEMORY, label="ours, proofs (validation)")
    axes.axhline(100, color="#555555", linewidth=1, linestyle="--")
    axes.annotate(
        "trained with memory from the start", (0.0, 100), xycoords=("axes fraction", "data"),
        xytext=(4, 3), textcoords="offset points", fontsize=8, color="#555555",
    )  # fmt: skip
    shown = [(x, 100 * y) for x, y in GAP_CLOSED if x <= max(*percents, 5.0) * 1.1]
    axes.plot(
        *zip(*shown, strict=True), "D", color=PAPER, markerfacecolor="white",
        label="the paper, a model of 1B weights", linestyle="none",
    )  # fmt: skip
    axes.axhline(0, color="#555555", linewidth=1)
    axes.set_xlim(left=0)
    axes.set_ylim(min(-5, *shares) - 3, max(110, *shares) + 8)
    axes.set_xlabel("tokens trained on with memory, % of the training before")
    axes.set_ylabel("share of the gap closed, %")
    figure.legend(loc="outside upper left", ncols=2)
    return figure
