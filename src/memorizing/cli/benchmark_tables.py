"""What the verbs of `memorizing benchmark` print."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.table import Table

from memorizing.benchmark.preparing import summarize_machine
from memorizing.terminal import make_console


def print_steps(result: dict[str, Any]) -> None:
    """Print training steps as a table, and the limit and the machine below it."""
    has_peaks = any("beyond_entries_mib" in row for row in result["rows"])
    rows = []
    for row in result["rows"]:
        cells = ["no memory", f"{row['seconds']:.3f}", f"{row['ratio']:.3f}"]
        if row["entries"]:
            cells[0] = f"{row['entries']:,}"
            cells += [f"{row['added_s']:+.3f}", f"{row['product_s']:.3f}"]
            cells += [f"{1000 * row['append_s']:.2f}", f"{row['recall']:.3f}"]
            cells += [f"{row['beyond_entries_mib']:+,.0f}"] if has_peaks else []
        rows.append(cells)
    limit = result["limit"]
    columns = ["entries", "step s", "ratio", "added s", "product s", "append ms", "recall"]
    _print_table(
        f"a training step of one row, memory searched by {result['index']}",
        [*columns, *(["peak MiB"] if has_peaks else [])],
        rows,
        "ratio and added: to the step without memory; product: the bare bf16 products of queries "
        "and keys; append: committing a segment; recall: of random queries"
        + ("; peak: beyond the step without memory and the entries" if has_peaks else ""),
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
    rows = [
        [
            row["name"].replace("_", " "),
            f"{row['entries']:,}" if row["entries"] else "-",
            f"{row['tokens_per_s']:,.0f}",
            f"{row['seconds']:.3f}",
            f"{row['ratio']:.3f}",
            f"{row['added_s']:+.3f}" if row["entries"] else "-",
            f"{row['recall']:.3f}" if "recall" in row else "-",
        ]
        for row in result["rows"]
    ]
    _print_table(
        f"reading a text into memory, searched by {result['index']}",
        ["memory", "entries", "tokens/s", "segment s", "ratio", "added s", "recall"],
        rows,
        f"{result['parameters']:,} weights, segments of {result['segment_len']:,} tokens, "
        f"{result['precision']}; ratio of seconds to no memory; medians of {result['num_pairs']} "
        "pairs; recall of random queries",
        summarize_machine(result),
    )


def print_tokens(result: dict[str, Any]) -> None:
    """Print the times of a token as a table, with the recall they are worth."""
    labels = {"no_memory": "no memory", "memory": "with memory", "search": "searches alone"}
    rows = []
    for row in result["rows"]:
        cells = [labels[row["name"]], f"{row['entries']:,}" if row["entries"] else "-"]
        cells += [f"{1000 * row['seconds']:.2f}", f"{row['ratio']:.3f}"]
        if row["name"] == "memory":
            cells += [f"{1000 * row['added_s']:+.2f}", f"{row['recall']:.3f}"]
            cells += [f"{row['build_s']:,.1f}"]
        rows.append(cells)
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
        rows,
        f"keys and queries are {keys}; the index took {result['rows'][1]['index_mib']:,.0f} MiB "
        "beside the entries",
        f"{result['parameters']:,} weights, {result['precision']}; ratio to no memory; medians of "
        f"{result['num_pairs']} pairs",
        summarize_machine(result),
    )


def _print_table(
    title: str, columns: Sequence[str], rows: Sequence[list[str]], *notes: str
) -> None:
    """Print numbers below their names, dashes where a row has none, and sentences below."""
    table = Table(title=title)
    for number, name in enumerate(columns):
        is_label = not number and name != "entries"
        table.add_column(name, justify="left" if is_label else "right", no_wrap=not number)
    for cells in rows:
        table.add_row(*cells, *["-"] * (len(columns) - len(cells)))
    console = make_console()
    console.print(table)
    for note in notes:
        console.print(note, highlight=False)


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
        for note in notes:
            console.print(note, highlight=False)
        console.print()
    for name, reason in result["unavailable"].items():
        console.print(f"not compared with {name}: {reason}", markup=False, highlight=False)
    shape, versions = result["shape"], result["versions"]
    packages = [name for name in ("torch", "faiss-cpu", "scann") if name in versions]
    console.print(
        f"{shape['num_heads']} heads x {shape['num_queries']:,} queries x {shape['head_dim']} "
        f"dimensions, k = {shape['num_neighbors']}, bf16; medians of interleaved pairs; recall "
        "of the neighbors by fp32 products (exact search selects by bf16 scores); "
        f"{result['processor']}, threads: {result['threads']}, cores: {result['cores']}; "
        + ", ".join(f"{name} {versions[name]}" for name in packages),
        markup=False,
        highlight=False,
    )
