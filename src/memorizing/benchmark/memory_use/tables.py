"""Tables of arms: a line for each, numbers with their intervals below them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

QUALITY = {
    "right": ("right of {answer_len}", ".1f"),
    "whole": ("whole answers", ".0%"),
    "exact": ("exact", ".0%"),
    "similarity": ("similarity", ".2f"),
    "names": ("names", ".0%"),
    "nats": ("nats a token", ".3f"),
}
"""Name of a number -> its column and how it is written."""
EXPLAINED = {
    "recall": "right: tokens of the true answer that greedy decoding writes before its first "
    "error; whole: answers without one; nats: of the true answer, less is better.",
    "completion": "exact: arguments written as they stand in the file, but for white space; "
    "similarity: 1 is the same letters, 0 all others (edit distance); names: of the true "
    "answer's, how many are written; nats: of the true answer, less is better.",
}


def make_table(
    title: str,
    columns: Sequence[str],
    rows: Sequence[dict[str, Any]],
    list_cells: Callable[[dict[str, Any]], list[str]],
) -> Table:
    """A line per arm; those that are out of the ranking below a line."""
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("", no_wrap=True)
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    ordered = sorted(rows, key=lambda row: not row["is_ranked"])
    for number, row in enumerate(ordered):
        is_last_ranked = number + 1 < len(ordered) and not ordered[number + 1]["is_ranked"]
        table.add_row(
            row["label"], *list_cells(row), end_section=row["is_ranked"] and is_last_ranked
        )
    return table


def write_estimate(found: dict[str, Any] | None, form: str) -> str:
    """A number, and its interval below it; a difference that excludes zero has a star."""
    if found is None:
        return "-"
    numbers = [found["value"], *(found["interval"] or ())]
    value, *ends = (format(number, form) for number in numbers)
    if not ends:
        return value
    star = "*" if form.startswith("+") and found["excludes_zero"] else ""
    return f"{star}{value}\n{ends[0].removesuffix('%')} to {ends[1]}"
