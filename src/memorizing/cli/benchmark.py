"""`memorizing benchmark`."""

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
  memorizing benchmark step
  memorizing benchmark step --entries 8192,65536 --pairs 5 --json step.json
  memorizing benchmark step --recipe small
"""

app = typer.Typer(help="Measure speed on this machine.", rich_markup_mode=None)


@app.callback()
def _set_up() -> None:
    """Measure speed on this machine."""


@app.command("step", epilog=EXAMPLES)
def run_step(
    entries: Annotated[
        str, typer.Option(metavar="N,N,...", help="Entries of each memory, full.")
    ] = "8192,65536",
    recipe: Annotated[
        str, typer.Option(metavar="RECIPE", help="Name of a recipe, or a TOML file.")
    ] = "paper_200m",
    pairs: Annotated[
        int, typer.Option(min=1, help="Measurements of each, interleaved with the step without.")
    ] = 20,
    json_file: JsonOption = None,
) -> None:
    """Time a training step of one row with a full memory, and without memory.

    A step is forward, loss, backward and commit. The medians of interleaved pairs are compared.
    """
    from memorizing.config import load_config

    numbers = parse_numbers(entries, "--entries")
    config = load_config(recipe)
    prepare_file(json_file)

    from memorizing.benchmark import benchmark_step

    with show_progress("timing steps") as progress:
        result = benchmark_step(
            config.model, entries=numbers, num_pairs=pairs, on_progress=progress
        )
    print_rows(result)
    write_result(json_file, result)


def print_rows(result: dict[str, Any]) -> None:
    """Print the steps as a table."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title="a training step of one row")
    for name in ("entries", "seconds", "ratio", "added seconds"):
        table.add_column(name, justify="right")
    for row in result["rows"]:
        entries = f"{row['entries']:,}" if row["entries"] else "no memory"
        added = f"{row['added_s']:+.3f}"
        table.add_row(entries, f"{row['seconds']:.3f}", f"{row['ratio']:.3f}", added)
    console = Console()
    console.print(table)
    console.print(
        f"{result['parameters']:,} weights, segments of {result['segment_len']:,} tokens, "
        f"{result['precision']}, {result['threads']} threads; "
        f"medians of {result['num_pairs']} pairs",
        highlight=False,
    )
