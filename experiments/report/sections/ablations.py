"""What each part of the recipe is worth: one thing changed at a time."""

from __future__ import annotations

from collections.abc import Mapping

from comparing import Change, compare, measure
from formatting import (
    MISSING,
    format_change,
    format_number,
    format_percent,
    format_seeds,
    join_words,
    make_table,
)
from pictures import MEMORY, draw, show_percents, start_figure
from results import Results, Run, Seeds
from section import Section, describe_sources, show_picture

_PICTURE = "results_ablations.png"
_BASE = "ours"
_GROUPS: dict[str, tuple[str, ...]] = {
    "memory": ("cache",),
    "layer": ("layer-", "layers-"),
    "neighbors": ("k-",),
    "combining": ("joint",),
    "normalization and bias": ("no-normalization", "no-bias"),
    "mixing and start": ("no-induction", "conv-", "smear", "no-mixing"),
    "training": ("closed-",),
}
"""How the names of a group's arms begin."""
_REST = "other"


def covers(run: Run) -> bool:
    """Whether this section shows a run."""
    return run.experiment == "ablations" and run.family == "proofs"


def find_group(arm: str) -> str:
    """The group of an arm."""
    for group, beginnings in _GROUPS.items():
        if arm.startswith(beginnings):
            return group
    return _REST


def write(results: Results) -> Section:
    """A line an arm, sorted within groups, and the plot."""
    arms = {arm: results.find("ablations", arm) for arm in results.list_arms("ablations")}
    runs = [run for arm in arms.values() for run in arm.values()]
    parts = [
        "Our first recipe on proofs with one thing changed, in short runs, judged on the "
        "validation documents with the memory of training; change against that recipe as it is. "
        "These are choices, not claims: one seed where not said otherwise, and small differences "
        "are none.",
        describe_sources(runs, "python experiments/queue --run ablations/"),
    ]
    if not runs:
        return Section("Ablations", tuple(parts))
    base = arms.pop(_BASE, {})
    changes = {arm: _compare(seeds, base) for arm, seeds in arms.items()}
    groups = _sort(changes)
    rows = [(_BASE, "", format_number(_measure(base)), "0" if base else "", "")]
    for group, names in groups.items():
        for name in names:
            change = changes[name]
            cells = (format_number(_measure(arms[name])), format_change(change))
            rows.append((f"`{name}`", group, *cells, format_seeds(change)))
    has_seeds = any(row[-1] for row in rows)
    header = ("arm", "group", "perplexity", "change (95%)", "by seed")
    width = len(header) if has_seeds else len(header) - 1
    parts += [
        make_table(header[:width], [row[:width] for row in rows], num_text=2),
        _summarize(changes),
    ]
    if any(change is not None for change in changes.values()):
        shown = {g: {n: c for n in ns if (c := changes[n]) is not None} for g, ns in groups.items()}
        # What memory is worth has another scale than what is changed of it.
        without = shown.pop("memory", {}).get("cache")
        groups_shown = {group: found for group, found in shown.items() if found}
        if groups_shown:
            parts.append(
                show_picture(_PICTURE, "Change of perplexity by what is changed of the recipe")
            )
            pictures = {_PICTURE: _plot(groups_shown, without)}
            return Section("Ablations", tuple(parts), pictures)
    return Section("Ablations", tuple(parts))


def _find_name(arm: Seeds) -> str | None:
    """The evaluation of an arm on validation documents."""
    for run in arm.values():
        for name, values in run.evaluations.items():
            if values["use"] == "validation" and values["control"] is None:
                return name
    return None


def _measure(arm: Seeds) -> float | None:
    name = _find_name(arm)
    return None if name is None else measure(arm, name)


def _compare(arm: Seeds, base: Seeds) -> Change | None:
    names = _find_name(arm), _find_name(base)
    return None if names[0] is None or names[1] is None else compare(arm, names[0], base, names[1])


def _sort(changes: Mapping[str, Change | None]) -> dict[str, list[str]]:
    groups = {}
    for group in (*_GROUPS, _REST):
        names = [name for name in changes if find_group(name) == group]
        if names:
            groups[group] = sorted(
                names, key=lambda name: (c.value if (c := changes[name]) else 0, name)
            )
    return groups


def _summarize(changes: Mapping[str, Change | None]) -> str:
    found = {name: change for name, change in changes.items() if change is not None}
    if not found:
        return f"Our recipe itself is {MISSING}: no changes yet."
    worse = [f"`{name}`" for name, c in found.items() if c.difference.low > 0]
    better = [f"`{name}`" for name, c in found.items() if c.difference.high < 0]
    return (
        f"Of {len(found)} changes {len(worse)} raise perplexity with an interval above zero; "
        f"lower it with an interval below zero: {join_words(better)}."
    )


@draw
def _plot(groups: Mapping[str, Mapping[str, Change]], without: Change | None):
    lines = [(group, name, c) for group, found in groups.items() for name, c in found.items()]
    figure, ((axes,),) = start_figure(7.0, 1.0 + 0.235 * (len(lines) + 0.6 * len(groups)))
    place, places = 0.0, []
    for number, (group, _, change) in enumerate(lines):
        if number == 0 or lines[number - 1][0] != group:
            place -= 0.6 if number else 0.0
            axes.annotate(
                group, (1, place), xycoords=("axes fraction", "data"), ha="right", va="center",
                fontsize=8, color="#777777",
                bbox={"facecolor": "white", "edgecolor": "none", "pad": 1.5},
            )  # fmt: skip
        if change.interval is not None:
            axes.plot(
                [100 * end for end in change.interval],
                [place] * 2,
                color=MEMORY,
                linewidth=2,
                alpha=0.5,
            )
        axes.plot([100 * change.value], [place], "o", color=MEMORY)
        places.append(place)
        place -= 1.0
    axes.axvline(0, color="#555555", linewidth=1)
    axes.set_yticks(places, [name for _, name, _ in lines])
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="y", visible=False)
    axes.spines["left"].set_visible(False)
    axes.set_ylim(place + 0.3, 0.7)
    # Room for the names of groups on the right.
    low, high = axes.get_xlim()
    axes.set_xlim(low, high + 0.28 * (high - low))
    show_percents(axes.xaxis)
    what = "validation perplexity against that recipe as it is"
    beyond = "" if without is None else f" (without memory: {format_percent(without.value)})"
    axes.set_xlabel(what + beyond)
    return figure
