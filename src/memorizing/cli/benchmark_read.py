"""`memorizing benchmark read`."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from memorizing.cli.output import (
    JsonOption,
    parse_numbers,
    prepare_file,
    show_progress,
    write_result,
)

EXAMPLES = """\b
examples:
  memorizing benchmark read
  memorizing benchmark read --entries 65536,262144 --pairs 10 --json read.json
  memorizing benchmark read --recipe small --index exact
"""


def run(
    entries: Annotated[
        str, typer.Option(metavar="N,N,...", help="Entries of each memory, full.")
    ] = "8192,65536",
    recipe: Annotated[
        str, typer.Option(metavar="RECIPE", help="Name of a recipe, or a TOML file.")
    ] = "paper_200m",
    pairs: Annotated[
        int, typer.Option(min=1, help="Segments, interleaved with segments without memory.")
    ] = 20,
    index: Annotated[
        str, typer.Option(metavar="INDEX", help="What searches: NAME or NAME:OPTION=VALUE,...")
    ] = "exact",
    json_file: JsonOption = None,
) -> None:
    """Time reading a long text into memory, searched or closed, and without memory.

    Reading is forward without gradient and commit, segment by segment, weights in bf16, one row.
    """
    from memorizing.config import load_config

    numbers = parse_numbers(entries, "--entries")
    config = load_config(recipe)
    prepare_file(json_file)

    from memorizing.benchmark.read import benchmark_read

    with show_progress("timing segments") as progress:
        result = benchmark_read(
            config.model, entries=numbers, num_pairs=pairs, index=index, on_progress=progress
        )
    print_rows(result)
    write_result(json_file, result)


def print_rows(result: dict[str, Any]) -> None:
    """Print the speeds of reading as a table."""
    from rich.console import Console
    from rich.table import Table

    from memorizing.benchmark.preparing import summarize_machine

    table = Table(title=f"reading a text into memory, searched by {result['index']}")
    for name in ("memory", "entries", "tokens/s", "segment s", "ratio", "added s", "recall"):
        table.add_column(name, justify="left" if name == "memory" else "right")
    for row in result["rows"]:
        table.add_row(
            row["name"].replace("_", " "),
            f"{row['entries']:,}" if row["entries"] else "-",
            f"{row['tokens_per_s']:,.0f}",
            f"{row['seconds']:.3f}",
            f"{row['ratio']:.3f}",
            f"{row['added_s']:+.3f}" if row["entries"] else "-",
            f"{row['recall']:.3f}" if "recall" in row else "-",
        )
    console = Console()
    console.print(table)
    lines = [
        f"{result['parameters']:,} weights, segments of {result['segment_len']:,} tokens, "
        f"{result['precision']}; ratio of seconds to no memory; medians of {result['num_pairs']} "
        "pairs; recall of random queries",
        summarize_machine(result),
    ]
    for line in lines:
        console.print(line, highlight=False)
