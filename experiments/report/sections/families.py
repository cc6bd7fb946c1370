"""Memory against the cache alone, on five families of text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from comparing import Change, compare, find_shared_seeds, measure
from formatting import (
    format_change,
    format_number,
    format_percent,
    format_seeds,
    join_words,
    make_table,
)
from paper import LIKE_FAMILY, compute_change
from pictures import COLORS, PAPER, draw, show_percents, start_figure
from results import FAMILIES, Results, Run
from section import Section, describe_sources, show_picture

LARGE = 65_536
CAPACITIES = (512, 2048, 8192, LARGE)
AIMS = {"proofs": -0.16, "code": -0.17, "math": -0.13, "books": -0.06, "web": -0.08}
"""Relative change of perplexity that we aim for."""

_PICTURE = "results_families.png"
_CONTROLS = {
    "0 off": "memory off",
    f"{LARGE} other_document": "another document's",
    f"{LARGE} shuffled": "values shuffled",
}


def covers(run: Run) -> bool:
    """Whether the main sections show a run."""
    return run.experiment == "main" and run.arm in ("memory", "cache")


def compare_families(results: Results, name: str = str(LARGE)) -> dict[str, Change]:
    """An evaluation of the memory arm against the cache alone, by family that has both."""
    found = {f: compare_family(results, f, name) for f in FAMILIES}
    return {family: change for family, change in found.items() if change is not None}


def compare_family(results: Results, family: str, name: str) -> Change | None:
    """An evaluation of a family's memory arm against the cache alone."""
    memory = results.find("main", "memory", family)
    return compare(memory, name, results.find("main", "cache", family), "0")


def write(results: Results) -> Section:
    """Tables, controls and the plot beside the paper."""
    changes = compare_families(results)
    runs = [run for run in results.runs if covers(run)]
    parts = [
        "Two models a family, alike but for the memory: both have a Transformer-XL cache of 512 "
        "and read the same tokens in the same order; one also has a memory of 8,192 entries "
        f"while it trains. Held-out documents are then read once with {LARGE:,} entries, the "
        "largest size of the plan.",
        describe_sources(runs, "python experiments/queue --run main/"),
        _name_outdated(results, runs),
    ]
    if not runs:
        return Section("Memory against the cache alone", tuple(parts))
    parts += [_make_main_table(results, changes), _summarize(changes)]
    pictures = {}
    if changes:
        pictures[_PICTURE] = _plot(changes)
        parts.append(show_picture(_PICTURE, "Change of perplexity by memory, ours and the paper's"))
    parts += [
        "Perplexity and bits per byte of the held-out documents, by entries in memory, over the "
        "seeds that all columns of a row have:",
        _make_capacity_table(results),
        f"Controls: the same model with {LARGE:,} entries, but the memory off, another "
        "document's, or with values shuffled among its entries; change against the cache alone. "
        "What is gained must be gone.",
        _make_control_table(results),
    ]
    return Section("Memory against the cache alone", tuple(parts), pictures)


def _name_outdated(results: Results, runs: Sequence[Run]) -> str:
    """Families that are not trained by the present recipe yet; of an old recipe all runs are."""
    old = {run.family for run in runs if results.is_outdated(run)}
    if not old:
        return ""
    names = join_words([family for family in FAMILIES if family in old])
    return (
        f"Here and in sections 2 and 3, **{names}** are by our first recipe (four tokens mixed "
        "instead of six, nothing done for the beginnings of documents, no pointer); what has "
        "changed since is in section 9."
    )


def _make_main_table(results: Results, changes: Mapping[str, Change]) -> str:
    rows = []
    for family in FAMILIES:
        arms = (
            (results.find("main", "cache", family), "0"),
            (results.find("main", "memory", family), str(LARGE)),
        )
        seeds = find_shared_seeds(*arms)
        cache, memory = (measure(arm, name, seeds=seeds) for arm, name in arms)
        change = changes.get(family)
        corpus = LIKE_FAMILY[family]
        rows.append(
            (
                family,
                format_number(cache),
                format_number(memory),
                format_change(change),
                format_seeds(change),
                f"{AIMS[family]:.0%}",
                f"{corpus} {format_percent(compute_change((512, LARGE, True), corpus))}",
            )
        )
    header = ("family", "cache alone", "memory", "change (95%)", "by seed", "aim", "paper's change")
    return make_table(header, rows)


def _summarize(changes: Mapping[str, Change]) -> str:
    if not changes:
        return ""
    lower = [family for family, change in changes.items() if change.difference.high < 0]
    higher = [family for family, change in changes.items() if change.difference.low > 0]
    reached = [family for family, change in changes.items() if change.value <= AIMS[family]]
    missed = [family for family in changes if family not in reached]
    text = (
        f"Of {len(changes)} {'family' if len(changes) == 1 else 'families'} measured, memory "
        f"lowers perplexity, with an interval below zero, on {join_words(lower)}"
    )
    text += f"; it raises it on {join_words(higher)}. " if higher else ". "
    text += f"The aim is reached on {join_words(reached)}"
    return text + (f" and missed on {join_words(missed)}." if missed else ".")


def _make_capacity_table(results: Results) -> str:
    rows = []
    for family in FAMILIES:
        cache = results.find("main", "cache", family)
        memory = results.find("main", "memory", family)
        if not cache and not memory:
            continue
        columns = [(cache, "0"), *((memory, str(c)) for c in CAPACITIES)]
        seeds = find_shared_seeds(*columns)
        for key, label, digits in (
            ("perplexity", family, 2),
            ("bits_per_byte", f"{family}, bits per byte", 3),
        ):
            values = [measure(arm, name, key, seeds) for arm, name in columns]
            rows.append((label, *(format_number(value, digits) for value in values)))
    return make_table(("", "cache alone", *(f"{c:,}" for c in CAPACITIES)), rows)


def _make_control_table(results: Results) -> str:
    rows = []
    for family in FAMILIES:
        if not results.find("main", "memory", family):
            continue
        names = (str(LARGE), *_CONTROLS)
        changes = [compare_family(results, family, name) for name in names]
        rows.append((family, *(format_change(change) for change in changes)))
    return make_table(("family", "its own memory", *_CONTROLS.values()), rows)


@draw
def _plot(changes: Mapping[str, Change]):
    figure, grid = start_figure(7.0, 1.25 + 0.5 * len(changes))
    axes = grid[0, 0]
    families = list(changes)[::-1]
    for place, family in enumerate(families):
        change, color = changes[family], COLORS[family]
        if change.interval is not None:
            low, high = (100 * end for end in change.interval)
            axes.plot([low, high], [place + 0.1] * 2, color=color, linewidth=2.4, alpha=0.55)
        seeds = [100 * value for value in change.by_seed.values()]
        if len(seeds) > 1:
            axes.plot(seeds, [place + 0.1] * len(seeds), "|", color=color, markersize=11)
        axes.plot([100 * change.value], [place + 0.1], "o", color=color, markersize=8)
        paper = compute_change((512, LARGE, True), LIKE_FAMILY[family])
        assert paper is not None
        axes.plot([100 * paper], [place - 0.2], "D", color=PAPER, markerfacecolor="white")
        axes.annotate(
            LIKE_FAMILY[family], (100 * paper, place - 0.2), xytext=(7, 0), va="center",
            textcoords="offset points", fontsize=7.5, color=PAPER,
        )  # fmt: skip
    axes.axvline(0, color="#555555", linewidth=1)
    axes.plot([], [], "o", color="#555555", markersize=8, label="ours, with its 95% interval")
    if any(len(change.by_seed) > 1 for change in changes.values()):
        axes.plot([], [], "|", color="#555555", markersize=11, label="ours, each seed")
    axes.plot([], [], "D", color=PAPER, markerfacecolor="white", label="the paper's")
    axes.set_yticks(range(len(families)), families, fontsize=10)
    axes.set_ylim(-0.55, len(families) - 0.4)
    axes.grid(axis="y", visible=False)
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
    show_percents(axes.xaxis)
    axes.set_xlabel(f"perplexity with a memory of {LARGE:,} entries, against the cache alone")
    figure.legend(loc="outside upper left", ncols=3)
    return figure
