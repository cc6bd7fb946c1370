"""`memorizing benchmark step`."""

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
  memorizing benchmark step --entries 262144 --peak-memory
  memorizing benchmark step --recipe small --index exact
"""

_NUM_PEAKS = 3
"""Processes of which `--peak-memory` takes the median."""


def run(
    entries: Annotated[
        str, typer.Option(metavar="N,N,...", help="Entries of each memory, full.")
    ] = "8192,65536",
    recipe: Annotated[
        str, typer.Option(metavar="RECIPE", help="Name of a recipe, or a TOML file.")
    ] = "paper_200m",
    pairs: Annotated[
        int, typer.Option(min=1, help="Measurements of each, interleaved with the step without.")
    ] = 20,
    index: Annotated[
        str, typer.Option(metavar="INDEX", help="What searches: NAME or NAME:OPTION=VALUE,...")
    ] = "exact",
    peak_memory: Annotated[
        bool, typer.Option("--peak-memory", help="Also measure peak memory, in fresh processes.")
    ] = False,
    json_file: JsonOption = None,
) -> None:
    """Time a training step of one row with a full memory, and without memory.

    A step is forward, loss, backward and commit. The medians of interleaved pairs are compared, and
    stand beside the bare products of the search (product) and the time of committing a segment
    (append). The step without memory is compared with its arithmetic limit.
    """
    from memorizing.config import load_config

    numbers = parse_numbers(entries, "--entries")
    config = load_config(recipe)
    prepare_file(json_file)

    from memorizing.benchmark.step import benchmark_step

    with show_progress("timing steps") as progress:
        result = benchmark_step(
            config.model,
            entries=numbers,
            num_pairs=pairs,
            index=index,
            num_peaks=_NUM_PEAKS if peak_memory else 0,
            on_progress=progress,
        )
    print_rows(result)
    write_result(json_file, result)


def print_rows(result: dict[str, Any]) -> None:
    """Print the steps as a table, and the limit and the machine below it."""
    from rich.console import Console
    from rich.table import Table

    from memorizing.benchmark.preparing import summarize_machine

    table = Table(title=f"a training step of one row, memory searched by {result['index']}")
    has_peaks = any("beyond_entries_mib" in row for row in result["rows"])
    columns = ["entries", "step s", "ratio", "added s", "product s", "append ms", "recall"]
    for name in [*columns, *(["peak MiB"] if has_peaks else [])]:
        table.add_column(name, justify="right", no_wrap=name == "entries")
    for row in result["rows"]:
        if not row["entries"]:
            cells = ["no memory", f"{row['seconds']:.3f}", f"{row['ratio']:.3f}"]
            cells += ["-"] * (len(table.columns) - len(cells))
        else:
            cells = [
                f"{row['entries']:,}",
                f"{row['seconds']:.3f}",
                f"{row['ratio']:.3f}",
                f"{row['added_s']:+.3f}",
                f"{row['product_s']:.3f}",
                f"{1000 * row['append_s']:.2f}",
                f"{row['recall']:.3f}",
            ]
            cells += [f"{row['beyond_entries_mib']:+,.0f}"] if has_peaks else []
        table.add_row(*cells)
    limit = result["limit"]
    console = Console()
    console.print(table)
    lines = [
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
    ]
    for line in lines:
        console.print(line, highlight=False)
