"""`memorizing benchmark decode`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from memorizing.cli.output import JsonOption, prepare_file, show_progress, write_result

EXAMPLES = """\b
examples:
  memorizing benchmark decode
  memorizing benchmark decode --entries 1048576 --pairs 50 --json decode.json
  memorizing benchmark decode --index faiss_hnsw:ef_search=128 --recorded real.safetensors
"""


def run(
    entries: Annotated[
        int, typer.Option(min=1, metavar="N", help="Entries of the memory, full.")
    ] = 65_536,
    recipe: Annotated[
        str, typer.Option(metavar="RECIPE", help="Name of a recipe, or a TOML file.")
    ] = "paper_200m",
    pairs: Annotated[
        int, typer.Option(min=1, help="Tokens, interleaved with tokens without memory.")
    ] = 100,
    index: Annotated[
        str, typer.Option(metavar="INDEX", help="What searches: NAME or NAME:OPTION=VALUE,...")
    ] = "exact",
    recorded: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="Recorded keys and queries, in the place of random ones."
        ),
    ] = None,
    json_file: JsonOption = None,
) -> None:
    """Time decoding one token with a full memory, and without memory.

    Weights are bf16, the batch is one row, and no gradient is kept. The index is built and sealed
    first. Graphs and lists are quicker or slower with the queries, so give recorded ones.
    """
    from memorizing.config import load_config

    config = load_config(recipe)
    prepare_file(json_file)

    from memorizing.benchmark.decode import benchmark_decode
    from memorizing.benchmark.recording import load_recording

    recording = None if recorded is None else load_recording(recorded)
    with show_progress("timing tokens") as progress:
        result = benchmark_decode(
            config.model,
            entries=entries,
            num_pairs=pairs,
            index=index,
            recording=recording,
            on_progress=progress,
        )
    print_rows(result)
    write_result(json_file, result)


def print_rows(result: dict[str, Any]) -> None:
    """Print the times of a token as a table, with the recall they are worth."""
    from rich.console import Console
    from rich.table import Table

    from memorizing.benchmark.preparing import summarize_machine

    table = Table(title=f"decoding one token, memory searched by {result['index']}")
    for name in ("", "entries", "ms a token", "ratio", "added ms", "recall", "build s"):
        table.add_column(name, justify="right" if name else "left")
    labels = {"no_memory": "no memory", "memory": "with memory", "search": "searches alone"}
    for row in result["rows"]:
        is_memory = row["name"] == "memory"
        table.add_row(
            labels[row["name"]],
            f"{row['entries']:,}" if row["entries"] else "-",
            f"{1000 * row['seconds']:.2f}",
            f"{row['ratio']:.3f}",
            f"{1000 * row['added_s']:+.2f}" if is_memory else "-",
            f"{row['recall']:.3f}" if is_memory else "-",
            f"{row['build_s']:,.1f}" if is_memory else "-",
        )
    console = Console()
    console.print(table)
    memory = result["rows"][1]
    recorded = result["recorded"]
    lines = [
        "keys and queries are "
        + (
            "random"
            if recorded is None
            else f"recorded, {recorded['num_entries']:,} keys and {recorded['num_queries']:,} "
            f"queries of {recorded['num_heads']} heads"
        )
        + f"; the index took {memory['index_mib']:,.0f} MiB beside the entries",
        f"{result['parameters']:,} weights, {result['precision']}; ratio to no memory; medians of "
        f"{result['num_pairs']} pairs",
        summarize_machine(result),
    ]
    for line in lines:
        console.print(line, highlight=False)
