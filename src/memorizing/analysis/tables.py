"""Results as tables for a terminal of 80 columns."""

from __future__ import annotations

import math
from collections.abc import Mapping

from rich import box
from rich.table import Table

from memorizing.evaluation import EvaluationResult
from memorizing.metrics import Difference

_CONTROL_NAMES = {
    "off": "memory off",
    "other_document": "another document's memory",
    "shuffled": "values shuffled",
}
_CONTROLS_CAPTION = (
    "The last lines are diagnostics of the model with memory, which was trained to rely on it: "
    "they show what the content of the memory is worth to it, not how good a model without "
    "memory can be."
)


def name_result(result: EvaluationResult) -> str:
    """What a result is of: its control, or the entries of its memory."""
    if result.control is not None:
        return _CONTROL_NAMES[result.control]
    return f"{result.capacity:,} entries" if result.capacity else "no entries"


def make_result_table(
    results: Mapping[str, EvaluationResult],
    *,
    baseline: EvaluationResult | None = None,
    baseline_name: str = "cache only",
    differences: Mapping[str, Difference] | None = None,
    title: str | None = None,
) -> Table:
    """Perplexity and bits per byte of each result, and how they differ from a baseline.

    Args:
        results: by name, as `evaluate_capacities` returns them.
        baseline: another run on the same documents: the first line.
        baseline_name: its name in the table.
        differences: of each result from the baseline, by the same names (`compare_results`).
        title: above the table.
    """
    table = _make_table(title)
    if any(result.control is not None for result in results.values()):
        table.caption = _CONTROLS_CAPTION
    table.add_column("memory")
    table.add_column("perplexity", justify="right")
    table.add_column("bits/byte", justify="right")
    if differences is not None:
        table.add_column(f"vs {baseline_name}", justify="right")
        table.add_column("95% interval", justify="right")
    if baseline is not None:
        table.add_row(baseline_name, *_format_numbers(baseline), end_section=True)
    kinds = [result.control is not None for result in results.values()]
    for index, (name, result) in enumerate(results.items()):
        cells = _format_numbers(result)
        if differences is not None and name in differences:
            cells += _format_difference(differences[name])
        is_last = not kinds[index] and index + 1 < len(kinds) and kinds[index + 1]
        table.add_row(name_result(result).removesuffix(" memory"), *cells, end_section=is_last)
    return table


def make_position_table(results: Mapping[str, EvaluationResult], title: str | None = None) -> Table:
    """Perplexity by a token's position in its document: a line per bucket, a column per result.

    Args:
        results: of the same documents, by the columns' names.
        title: above the table.
    """
    table = _make_table(title)
    table.add_column("position in document")
    table.add_column("tokens", justify="right")
    for name in results:
        table.add_column(name, justify="right")
    columns = [result.by_position() for result in results.values()]
    for line in zip(*columns, strict=True):
        start, end = line[0].start, line[0].end
        place = f"from {start:,}" if end is None else f"{start:,} to {end - 1:,}"
        table.add_row(place, f"{line[0].tokens:,}", *(f"{b.perplexity:.3f}" for b in line))
    return table


def describe_reach(results: Mapping[str, EvaluationResult]) -> str | None:
    """A sentence where capacities exceed the longest document; None where none does."""
    beyond = [
        result
        for result in results.values()
        if result.control is None and result.capacity > result.longest
    ]
    if not beyond:
        return None
    capacities = " and ".join(f"{result.capacity:,}" for result in beyond)
    return (
        f"The longest document has {beyond[0].longest:,} tokens: a memory of {capacities} entries "
        "holds all of it, and a larger one would change nothing."
    )


def _make_table(title: str | None) -> Table:
    return Table(
        title=title,
        title_justify="left",
        title_style="bold",
        header_style="bold",
        caption_justify="left",
        caption_style="dim",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
    )


def _format_numbers(result: EvaluationResult) -> list[str]:
    bits = "" if math.isnan(result.bits_per_byte) else f"{result.bits_per_byte:.4f}"
    return [f"{result.perplexity:.3f}", bits]


def _format_difference(difference: Difference) -> list[str]:
    if math.isinf(difference.low):
        return [f"{difference.perplexity_change:+.1%}", "one block only"]
    low, high = difference.perplexity_interval
    return [f"{difference.perplexity_change:+.1%}", f"{low:+.1%} to {high:+.1%}"]
