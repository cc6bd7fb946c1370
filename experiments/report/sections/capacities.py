"""The size of the memory at evaluation, and where in a document it helps."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from comparing import Bucket, Change, compare, compare_positions
from formatting import (
    MISSING,
    format_change,
    format_difference,
    format_number,
    format_percent,
    join_words,
    make_table,
)
from pictures import COLORS, draw, label_ends, show_percents, start_figure
from results import FAMILIES, Results, Run
from section import Section, describe_sources, name_machines, show_picture

from sections.families import CAPACITIES, LARGE, compare_family

_PICTURE = "results_capacities.png"
_TRAINED = 8192
_SEGMENT = 512


def covers(run: Run) -> bool:
    """Its runs are those of the section before."""
    return False


def write(results: Results) -> Section:
    """Changes by capacity and by position."""
    by_capacity = {
        family: {c: compare_family(results, family, str(c)) for c in CAPACITIES}
        for family in FAMILIES
    }
    by_capacity = {f: found for f, found in by_capacity.items() if any(found.values())}
    by_position = {
        f: compare_positions(
            results.find("main", "memory", f), str(LARGE), results.find("main", "cache", f), "0"
        )
        for f in by_capacity
    }
    names = [str(capacity) for capacity in CAPACITIES]
    runs = [
        run
        for run in results.runs
        if run.experiment == "main"
        and run.arm == "memory"
        and any(n in run.evaluations for n in names)
    ]
    parts = [
        f"The models of section 1, trained with {_TRAINED:,} entries and read with smaller and "
        "larger memories; change against the cache alone. Where a capacity has fewer seeds than "
        "another, it is compared on those it has.",
        describe_sources(runs, "python experiments/queue --run main/"),
    ]
    if not by_capacity:
        return Section("Size of the memory, and position in the document", tuple(parts))
    larger = {f: _compare_sizes(results, f) for f in by_capacity}
    header = ("family", *(f"{c:,}" for c in CAPACITIES), f"{LARGE:,} against {_TRAINED:,}")
    rows = [
        (
            family,
            *(format_change(change) for change in found.values()),
            format_change(larger[family]),
        )
        for family, found in by_capacity.items()
    ]
    gains = [f for f, change in larger.items() if change is not None and change.difference.high < 0]
    parts += [
        make_table(header, rows),
        f"More memory than in training ({LARGE:,} against {_TRAINED:,} entries) lowers "
        f"perplexity, with an interval below zero, on {join_words(gains)}.",
        show_picture(_PICTURE, "Change of perplexity by size of the memory and by position"),
        f"By position in the document, {LARGE:,} entries:",
        _make_position_table(by_position),
        _describe_beginnings(by_position),
        _write_starts(results.others.get("document_starts")),
    ]
    return Section(
        "Size of the memory, and position in the document",
        tuple(parts),
        {_PICTURE: _plot(by_capacity, by_position)},
    )


def _compare_sizes(results: Results, family: str) -> Change | None:
    memory = results.find("main", "memory", family)
    return compare(memory, str(LARGE), memory, str(_TRAINED))


def _make_position_table(by_position: Mapping[str, Mapping[Bucket, float]]) -> str:
    buckets = _list_buckets(by_position)
    rows = []
    for family, found in by_position.items():
        cells = [format_percent(found[b]) if b in found else "" for b in buckets]
        rows.append((family, *(cells if found else [MISSING] * len(buckets))))
    return make_table(("family", *(name_bucket(b) for b in buckets)), rows)


def _describe_beginnings(by_position: Mapping[str, Mapping[Bucket, float]]) -> str:
    first = (0, _SEGMENT)
    found = [f"{format_percent(b[first])} on {f}" for f, b in by_position.items() if first in b]
    if not found:
        return ""
    return (
        f"On the first {_SEGMENT} tokens of a document, where its memory is still empty, the model "
        f"trained with memory differs from the cache alone by {join_words(found)}."
    )


def _write_starts(values: Mapping[str, Any] | None) -> str:
    """Many spans, each read as a document; nothing where that is not measured."""
    if values is None:
        return ""
    rows = [
        (
            name.replace("-seed", ", seed "),
            f"{pair['spans']:,}",
            *(format_number(pair["perplexity"][arm]) for arm in ("cache", "memory")),
            format_difference(pair["change"]),
        )
        for name, pair in values["pairs"].items()
    ]
    header = ("models of the present recipe", "spans", "cache alone", "memory", "change (95%)")
    return (
        "Those are the first tokens of a few documents. More of them: spans of 512 tokens from "
        "all of each test document, each read as a document of its own. Repeat: "
        f"`python experiments/document_starts.py`.\n\n{make_table(header, rows)}\n\n"
        f"{name_machines(pair['machine'] for pair in values['pairs'].values())}"
    )


def _list_buckets(by_position: Mapping[str, Mapping[Bucket, float]]) -> list[Bucket]:
    return sorted({b for found in by_position.values() for b in found}, key=lambda b: b[0])


def name_bucket(bucket: Bucket) -> str:
    """Positions in short: 512 to 2K."""
    start, end = (_shorten(edge) if edge is not None else None for edge in bucket)
    return f"from {start}" if end is None else f"{start} to {end}"


def _shorten(edge: int) -> str:
    return f"{edge // 1024}K" if edge >= 1024 else str(edge)


@draw
def _plot(
    by_capacity: Mapping[str, Mapping[int, Change | None]],
    by_position: Mapping[str, Mapping[Bucket, float]],
):
    figure, ((left, right),) = start_figure(9.6, 3.7, columns=2, sharey=True)
    ends = []
    for family, found in by_capacity.items():
        points = [(c, 100 * change.value) for c, change in found.items() if change is not None]
        left.plot(*zip(*points, strict=True), "o-", color=COLORS[family])
        ends.append((family, *points[-1], COLORS[family]))
    left.set_xscale("log", base=2)
    left.set_xticks(CAPACITIES, [f"{c:,}" for c in CAPACITIES])
    left.axvline(_TRAINED, color="#999999", linewidth=1, linestyle=":")
    left.annotate(
        "trained with", (_TRAINED, 1), xycoords=("data", "axes fraction"), xytext=(-4, -2),
        ha="right", va="top", textcoords="offset points", fontsize=8, color="#777777",
    )  # fmt: skip
    left.set_xlabel("entries in memory, per row and head")
    left.set_ylabel("perplexity against the cache alone")
    left.set_title("by size of the memory")
    buckets = _list_buckets(by_position)
    right_ends = []
    for family, found in by_position.items():
        points = [(buckets.index(b), 100 * value) for b, value in found.items()]
        if points:
            right.plot(*zip(*points, strict=True), "o-", color=COLORS[family])
            right_ends.append((family, *points[-1], COLORS[family]))
    right.set_xticks(
        range(len(buckets)), [name_bucket(b).replace(" to ", "\nto ") for b in buckets]
    )
    right.set_xlabel("position in the document, tokens")
    right.set_title(f"by position, {LARGE:,} entries")
    for axes in (left, right):
        axes.axhline(0, color="#555555", linewidth=1)
        axes.grid(axis="x", visible=False)
        axes.margins(y=0.08)
    show_percents(left.yaxis)
    label_ends(left, ends)
    label_ends(right, right_ends)
    return figure
