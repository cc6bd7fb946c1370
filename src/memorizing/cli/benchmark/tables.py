"""What the verbs of `memorizing benchmark` print."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table

from memorizing.benchmark.preparing import summarize_machine
from memorizing.terminal import make_console

_LABELS = {"no_memory": "no memory", "memory": "with memory", "search": "searches alone"}
_NUMBERS = {
    "entries": ("entries", 1, ","),
    "step s": ("seconds", 1, ".3f"),
    "segment s": ("seconds", 1, ".3f"),
    "ms a token": ("seconds", 1000, ".2f"),
    "tokens/s": ("tokens_per_s", 1, ",.0f"),
    "ratio": ("ratio", 1, ".3f"),
    "added s": ("added_s", 1, "+.3f"),
    "added ms": ("added_s", 1000, "+.2f"),
    "product s": ("product_s", 1, ".3f"),
    "append ms": ("append_s", 1000, ".2f"),
    "recall": ("recall", 1, ".3f"),
    "build s": ("build_s", 1, ",.1f"),
    "peak MiB": ("beyond_entries_mib", 1, "+,.0f"),
}
"""Column -> field of a row, factor and format."""


def print_steps(result: dict[str, Any]) -> None:
    """Print training steps as a table, and the limit and the machine below it."""
    peak = ["peak MiB"] if any("beyond_entries_mib" in row for row in result["rows"]) else []
    limit = result["limit"]
    _print_table(
        f"a training step of one row, memory searched by {result['index']}",
        ["entries", "step s", "ratio", "added s", "product s", "append ms", "recall", *peak],
        result["rows"],
        "ratio and added: to the step without memory; product: the bare bf16 products of queries "
        "and keys; append: committing a segment; recall: of random queries"
        + ("; peak: beyond the step without memory and the entries" if peak else ""),
        f"{limit['step_flops'] / 1e9:,.1f} GFLOP a step without memory at "
        f"{limit['product_tflops_per_s']:.3f} TFLOP/s, the speed of large {result['precision']} "
        f"products: limit {limit['limit_s']:.3f} s, of which the step reaches "
        f"{limit['share_of_limit']:.0%}",
        f"{result['parameters']:,} weights, segments of {result['segment_len']:,} tokens, "
        f"{result['precision']}; medians of {result['num_pairs']} pairs",
        summarize_machine(result),
    )


def print_segments(result: dict[str, Any]) -> None:
    """Print the speeds of reading as a table."""
    _print_table(
        f"reading a text into memory, searched by {result['index']}",
        ["memory", "entries", "tokens/s", "segment s", "ratio", "added s", "recall"],
        result["rows"],
        f"{result['parameters']:,} weights, segments of {result['segment_len']:,} tokens, "
        f"{result['precision']}; ratio of seconds to no memory; medians of {result['num_pairs']} "
        "pairs; recall of random queries",
        summarize_machine(result),
    )


def print_tokens(result: dict[str, Any]) -> None:
    """Print the times of a token as a table, with the recall they are worth."""
    recorded = result["recorded"]
    keys = "random"
    if recorded is not None:
        keys = (
            f"recorded, {recorded['num_entries']:,} keys and {recorded['num_queries']:,} queries "
            f"of {recorded['num_heads']} heads"
        )
    _print_table(
        f"decoding one token, memory searched by {result['index']}",
        ["", "entries", "ms a token", "ratio", "added ms", "recall", "build s"],
        result["rows"],
        f"keys and queries are {keys}; the index took {result['rows'][1]['index_mib']:,.0f} MiB "
        "beside the entries",
        f"{result['parameters']:,} weights, {result['precision']}; ratio to no memory; medians of "
        f"{result['num_pairs']} pairs",
        summarize_machine(result),
    )


def _print_table(
    title: str, columns: Sequence[str], rows: Sequence[Mapping[str, Any]], *notes: str
) -> None:
    """Print rows below their columns, dashes where one has no number, and sentences below."""
    table = Table(title=title)
    for number, column in enumerate(columns):
        is_number = column in _NUMBERS
        table.add_column(column, justify="right" if is_number else "left", no_wrap=not number)
    for row in rows:
        label = _LABELS.get(row["name"], row["name"])
        cells = [_format(row, column) if column in _NUMBERS else label for column in columns]
        # Where there are labels, they say so.
        table.add_row(label if cells[0] == "-" else cells[0], *cells[1:])
    console = make_console()
    console.print(table)
    for note in notes:
        console.print(note, highlight=False)


def _format(row: Mapping[str, Any], column: str) -> str:
    key, factor, form = _NUMBERS[column]
    is_base = row["name"] in ("no_memory", "search")
    if key not in row or (key == "entries" and not row[key]) or (key == "added_s" and is_base):
        return "-"
    return format(factor * row[key], form)


def print_searches(result: dict[str, Any]) -> None:
    """Print a table for every size and kind of keys, and on what it was measured."""
    console = make_console()
    for data, size in dict.fromkeys((row["data"], row["entries"]) for row in result["rows"]):
        rows = [r for r in result["rows"] if (r["data"], r["entries"]) == (data, size)]
        table = Table(title=f"{data} keys, {size:,} entries", title_justify="left")
        table.add_column("search", overflow="fold")
        for name in ("ms", "x product", "recall", "queries/s", "pairs"):
            table.add_column(name, justify="right", no_wrap=True)
        notes = []
        for row in rows:
            if row["compared_with"] == "product":
                table.add_row(
                    row["name"].replace(",", ", "),
                    f"{row['seconds'] * 1e3:,.2f}",
                    f"{row['ratio']:.2f}",
                    "" if row["recall"] is None else f"{row['recall']:.4f}",
                    f"{row['queries_per_second']:,.0f}",
                    str(row["num_pairs"]),
                )
            else:
                notes.append(
                    f"{row['name']} is {1 / row['ratio']:.2f} times as fast as "
                    f"{row['compared_with']} ({row['num_pairs']} pairs)"
                )
            if row["expected_recall"] is not None:
                notes.append(
                    f"{row['name']}: recall of {row['expected_recall']:.4f} expected by the "
                    f"formula for random buckets, {row['recall']:.4f} measured"
                )
        console.print(table)
        console.print("\n".join([*notes, ""]), highlight=False)
    for name, reason in result["unavailable"].items():
        console.print(f"not compared with {name}: {reason}", markup=False, highlight=False)
    shape, versions = result["shape"], result["versions"]
    packages = [
        f"{name} {versions[name]}" for name in ("torch", "faiss-cpu", "scann") if name in versions
    ]
    console.print(
        f"{shape['num_heads']} heads x {shape['num_queries']:,} queries x {shape['head_dim']} "
        f"dimensions, k = {shape['num_neighbors']}, bf16; medians of interleaved pairs; recall "
        "of the neighbors by fp32 products (exact search selects by bf16 scores); "
        f"{result['processor']}, threads: {result['threads']}, cores: {result['cores']}; "
        + ", ".join(packages),
        markup=False,
        highlight=False,
    )
