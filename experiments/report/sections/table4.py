"""The paper's Table 4 on proofs, by our recipe and by the paper's."""

from __future__ import annotations

import re

from comparing import Change, check_same_documents, compare, measure
from formatting import (
    MISSING,
    format_capacity,
    format_change,
    format_number,
    format_percent,
    join_words,
    make_table,
)
from paper import BASELINE, PERPLEXITIES, compute_change, read_perplexity
from results import Results, Run
from section import Section, describe_sources

_ARM = re.compile(r"(ours|paper)-(\d+)(?:-(\d+))?(-xl)?")
_LARGE = 65_536

Row = tuple[int, int, bool]
"""Context, memory, whether there is a cache."""


def covers(run: Run) -> bool:
    """Whether this section shows a run."""
    return run.experiment == "table4" and run.family == "proofs" and read_arm(run.arm) is not None


def read_arm(arm: str) -> tuple[str, Row] | None:
    """Recipe and row of an arm such as `ours-512-8192-xl`; None where it is of other form."""
    found = _ARM.fullmatch(arm)
    if found is None:
        return None
    recipe, context, memory, cache = found.groups()
    return recipe, (int(context), int(memory or 0), cache is not None)


def name_arm(recipe: str, row: Row) -> str:
    """The arm of a recipe and a row."""
    context, memory, has_cache = row
    return f"{recipe}-{context}{f'-{memory}' if memory else ''}{'-xl' if has_cache else ''}"


def write(results: Results) -> Section:
    """The table, and what a larger memory at evaluation gives."""
    runs = [run for run in results.runs if covers(run)]
    title = "The paper's Table 4, on proofs"
    parts = [
        "The rows of the paper's Table 4, each trained anew, once by our first recipe and once by "
        "the paper's (Adafactor with its schedule, warm-up scaled to the shorter run; queries and "
        "keys of single tokens). Every row has nearly as many training tokens; rows with context "
        "2,048 read two documents side by side, the others eight, so that not exactly the same "
        "documents are read. Changes are against the row with context 512 and cache of the same "
        "recipe; the paper's column is Isabelle.",
        describe_sources(runs, "python experiments/queue --run table4/"),
    ]
    if runs:
        check_same_documents(*(({run.seed: run}, name) for run in runs for name in run.evaluations))
        parts += [_make_table(results), _summarize(results), *_write_larger(results)]
    return Section(title, tuple(parts))


def compare_row(results: Results, recipe: str, row: Row) -> Change | None:
    """A row against the row with context 512 and cache, of one recipe."""
    arm = results.find("table4", name_arm(recipe, row))
    return compare(arm, str(row[1]), results.find("table4", name_arm(recipe, BASELINE)), "0")


def _list_rows(results: Results) -> list[Row]:
    """The paper's rows that are planned or run, in its order, then others of ours."""
    arms = {read_arm(arm) for arm in results.list_arms("table4")}
    for name in results.planned:
        if name.startswith("table4/proofs-"):
            arm = name.removeprefix("table4/proofs-").rpartition("-seed")[0]
            arms.add(read_arm(arm))
    ours = {found[1] for found in arms if found is not None}
    order = list(PERPLEXITIES)
    # A row that the paper has not stands behind the row that has one entry less.
    return sorted({*ours, *order}, key=lambda row: _find_place(row, order))


def _find_place(row: Row, order: list[Row]) -> tuple[int, int]:
    if row in order:
        return order.index(row), 0
    like = [i for i, other in enumerate(order) if (other[0], other[2]) == (row[0], row[2])]
    before = [i for i in like if order[i][1] < row[1]]
    return (max(before) if before else len(order)), row[1]


def _make_table(results: Results) -> str:
    planned = {name.removeprefix("table4/proofs-") for name in results.planned}
    rows = []
    for row in _list_rows(results):
        context, memory, has_cache = row
        perplexity = read_perplexity(row, "Isabelle")
        cells = [
            f"{context:,}",
            format_capacity(memory),
            f"{context:,}" if has_cache else "-",
            "-" if perplexity is None else format_number(perplexity),
            _format_reported(row),
        ]
        for recipe in ("ours", "paper"):
            arm = name_arm(recipe, row)
            runs = results.find("table4", arm)
            if not runs and f"{arm}-seed0" not in planned:
                cells += ["-", "-"]
                continue
            value = measure(runs, str(memory))
            change = compare_row(results, recipe, row)
            is_baseline = row == BASELINE and value is not None
            cells += [format_number(value), "0" if is_baseline else format_change(change)]
            if value is None:
                cells[-1] = ""
        rows.append(
            [
                f"**{cell}**" if row == BASELINE and cell not in ("-", "", MISSING) else cell
                for cell in cells
            ]
        )
    header = (
        "context", "memory", "cache", "paper", "its change", "our recipe", "change (95%)",
        "paper's recipe", "change (95%)",
    )  # fmt: skip
    return make_table(header, rows, num_text=0)


def _format_reported(row: Row) -> str:
    change = compute_change(row, "Isabelle")
    if change is None:
        return "-"
    return "0" if row == BASELINE else format_percent(change)


def _summarize(results: Results) -> str:
    sentences = []
    for recipe, name in (("ours", "Our recipe"), ("paper", "The paper's recipe")):
        changes = {row: compare_row(results, recipe, row) for row in _list_rows(results)}
        memory = {
            r: c for r, c in changes.items() if c is not None and r[1] and r[2] and r[0] == 512
        }
        if memory:
            described = [
                f"{format_percent(change.value)} with {row[1]:,} entries (paper "
                f"{format_percent(compute_change(row, 'Isabelle'))})"
                for row, change in memory.items()
            ]
            sentences.append(f"{name}, memory and cache: {join_words(described)}.")
    for row in ((512, _LARGE, True), BASELINE):
        change = compare(
            results.find("table4", name_arm("ours", row)), str(row[1]),
            results.find("table4", name_arm("paper", row)), str(row[1]),
        )  # fmt: skip
        if change is not None:
            what = f"{row[1]:,} entries" if row[1] else "the cache alone"
            sentences.append(f"Our recipe against the paper's, {what}: {format_change(change)}.")
    return " ".join(sentences)


def _write_larger(results: Results) -> list[str]:
    """Arms that were also read with a larger memory than they were trained with."""
    rows = []
    for row in _list_rows(results):
        changes = []
        for recipe in ("ours", "paper"):
            arm = results.find("table4", name_arm(recipe, row))
            name = str(_LARGE)
            changes.append(compare(arm, name, arm, str(row[1])) if 0 < row[1] < _LARGE else None)
        if any(changes):
            cells = [format_change(change) for change in changes]
            context = f"{row[0]:,}"
            rows.append((context, f"{row[1]:,}", context if row[2] else "-", *cells))
    if not rows:
        return []
    header = ("context", "trained with", "cache", "our recipe", "paper's recipe")
    return [
        f"Trained with a smaller memory and read with {_LARGE:,} entries, against the same model "
        "with as many as in training:",
        make_table(header, rows, num_text=0),
    ]
