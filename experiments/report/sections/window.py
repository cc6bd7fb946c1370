"""A longer sliding window as the other way to spend the compute."""

from __future__ import annotations

from typing import Any

from comparing import check_same_documents, compare, measure
from formatting import format_change, format_number, format_tokens, make_table
from results import Results, Run
from section import Section, describe_sources

_BASE = ("table4", "ours-512-xl", 0)
_OTHERS: dict[tuple[str, str, int], str] = {
    ("table4", "ours-512-8192-xl", 8192): "window 512, memory of 8,192",
    ("table4", "ours-512-8192-xl", 65_536): "the same, read with 65,536",
    ("table4", "ours-512-65536-xl", 65_536): "window 512, memory of 65,536",
    ("table4", "ours-2048-xl", 0): "segment and window 2,048",
}
"""Experiment, arm and entries at evaluation."""
_TIMED = {
    "table4/ours-512-xl": "cache",
    "window/window-512": "cache",
    "table4/ours-512-8192-xl": "memory",
    "table4/ours-2048-xl": "context-2048-cache",
    "window/window-1024": "window-1024",
    "window/window-2048": "window-2048",
}
"""Names in step_times.json."""
_WITH_TIMES = (
    "*Time of a step* is against the cache alone with window 512, measured in turns "
    "on a CPU (`step_times.json`); *of training* is times the tokens."
)
_WITHOUT_TIMES = "Step times measured in turns (`step_times.json`) are not there yet."


def covers(run: Run) -> bool:
    """Whether this section shows a run (table 4 has the others)."""
    is_window = run.arm.removeprefix("window-").isdigit()
    return run.experiment == "window" and run.family == "proofs" and is_window


def write(results: Results) -> Section:
    """A line a model."""
    arms = [arm for arm in results.list_arms("window") if arm.removeprefix("window-").isdigit()]
    windows = {
        ("window", arm, 0): f"window {int(arm.removeprefix('window-')):,}, in as much time"
        for arm in sorted(arms, key=lambda arm: int(arm.removeprefix("window-")))
    }
    places = {_BASE: "window 512, cache alone", **windows, **_OTHERS}
    runs = [run for run in results.runs if covers(run)]
    ratios = read_ratios(results)
    parts = [
        "Local attention over more tokens, without memory, beside memory with the short window "
        "(proofs). The arms of `window`, the short window without memory among them, train in as "
        "much time as the short window with a memory of 8,192, and so on other numbers of tokens; "
        f"the others are Table 4's. {_WITH_TIMES if ratios else _WITHOUT_TIMES}",
        describe_sources(runs, "python experiments/queue --run window/ table4/proofs-ours"),
    ]
    if not runs:
        return Section("A longer window instead", tuple(parts))
    check_same_documents(*((results.find(*place[:2]), str(place[2])) for place in places))
    base = results.find(*_BASE[:2])
    rows = []
    for (experiment, arm, capacity), name in places.items():
        found = results.find(experiment, arm)
        if not found:
            continue
        tokens = next(iter(found.values())).tokens
        is_base = (experiment, arm, capacity) == _BASE
        change = compare(found, str(capacity), base, "0")
        ratio = ratios.get(_TIMED.get(f"{experiment}/{arm}", ""))
        of_training = ""
        if ratio is not None and base:
            of_training = f"{ratio * tokens / next(iter(base.values())).tokens:.2f}"
        rows.append(
            (
                name,
                format_number(measure(found, str(capacity))),
                "0" if is_base else format_change(change),
                format_tokens(tokens),
                "" if ratio is None else f"{ratio:.2f}",
                of_training,
            )
        )
    header = ("model", "perplexity", "change (95%)", "tokens", "time of a step", "of training")
    width = len(header) if ratios else len(header) - 2
    parts.append(make_table(header[:width], [row[:width] for row in rows]))
    return Section("A longer window instead", tuple(parts))


def read_ratios(results: Results) -> dict[str, float]:
    """Times of a step against the cache alone, by the name of an arm, from step_times.json."""
    return {name: row["ratio"] for name, row in read_times(results, "step_times").items()}


def read_times(results: Results, file: str) -> dict[str, dict[str, Any]]:
    """What `experiments/step_times.py` has measured of each arm, by its name; none is empty."""
    found: Any = results.others.get(file, [])
    entries = found.get("rows", []) if isinstance(found, dict) else found
    return {entry["name"]: entry for entry in entries}
