"""`memorizing benchmark search`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from memorizing.cli.evaluate import require_matplotlib
from memorizing.cli.output import (
    JsonOption,
    parse_numbers,
    prepare_file,
    show_progress,
    write_result,
)

EXAMPLES = """\b
examples:
  memorizing benchmark search
  memorizing benchmark search --entries 8192,65536,262144 --json search.json
  memorizing benchmark search --indexes "exact;int8;faiss_hnsw:ef_search=128"
  memorizing benchmark record runs/small --entries 65536 --out small.recorded
  memorizing benchmark search --recorded small.recorded --plot search.png
"""


def run(
    entries: Annotated[
        str, typer.Option(metavar="N,N,...", help="Entries of each memory, full.")
    ] = "8192,65536",
    indexes: Annotated[
        list[str] | None,
        typer.Option(
            metavar="INDEX;INDEX;...",
            help="name or name:option=value,... (`memorizing info indexes`); may be given more "
            "than once.  [default: exact]",
        ),
    ] = None,
    recorded: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="Also search real keys, from `memorizing benchmark record`."
        ),
    ] = None,
    use_random: Annotated[
        bool, typer.Option("--random/--no-random", help="Search random keys.")
    ] = True,
    heads: Annotated[
        int | None,
        typer.Option(metavar="N", help="Heads.  [default: 8, or those of the recording]"),
    ] = None,
    queries: Annotated[
        int | None, typer.Option(metavar="N", help="Queries per head.  [default: 512]")
    ] = None,
    head_dim: Annotated[
        int | None,
        typer.Option(metavar="N", help="Dimensions.  [default: 128, or those of the recording]"),
    ] = None,
    neighbors: Annotated[int, typer.Option(metavar="K", help="Neighbors of each query.")] = 32,
    pairs: Annotated[
        int, typer.Option(min=1, help="Measurements of each, interleaved with the product.")
    ] = 20,
    json_file: JsonOption = None,
    plot: Annotated[
        Path | None,
        typer.Option(metavar="FILE.png", help="Draw recall against queries per second."),
    ] = None,
) -> None:
    """Time the search of a full memory by each index, and measure its recall.

    One search is all heads and queries. It is compared with the product of queries and keys alone,
    exact search also with torch.topk and faiss.knn. Results are checked before they are timed.
    """
    from memorizing.index_settings import parse_index

    numbers = parse_numbers(entries, "--entries")
    texts = [text for group in indexes or ["exact"] for text in group.split(";") if text.strip()]
    settings = [parse_index(text) for text in texts]
    prepare_file(json_file)
    if plot is not None:
        require_matplotlib()
    prepare_file(plot)

    from memorizing.benchmark import benchmark_search, choose_shape, load_recording

    recording = None if recorded is None else load_recording(recorded)
    shape = choose_shape(
        recording,
        num_heads=heads,
        num_queries=queries,
        head_dim=head_dim,
        num_neighbors=neighbors,
    )
    with show_progress("timing searches") as progress:
        result = benchmark_search(
            numbers,
            settings,
            shape=shape,
            recording=recording,
            use_random=use_random,
            num_pairs=pairs,
            on_progress=progress,
        )
    print_rows(result)
    write_result(json_file, result)
    if plot is not None:
        from memorizing.benchmark.plots import plot_search

        plot_search(result, plot)
        print(f"written: {plot}")


def print_rows(result: dict[str, Any]) -> None:
    """Print a table for every size and kind of keys, and on what it was measured."""
    from rich.console import Console
    from rich.table import Table

    console = Console()
    for data, size in dict.fromkeys((row["data"], row["entries"]) for row in result["rows"]):
        rows = [r for r in result["rows"] if (r["data"], r["entries"]) == (data, size)]
        table = Table(title=f"{data} keys, {size:,} entries", title_justify="left")
        table.add_column("search", overflow="fold")
        for name in ("ms", "x product", "recall", "queries/s", "pairs"):
            table.add_column(name, justify="right", no_wrap=True)
        for row in rows:
            if row["compared_with"] != "product":
                continue
            table.add_row(
                row["name"].replace(",", ", "),
                f"{row['seconds'] * 1e3:,.2f}",
                f"{row['ratio']:.2f}",
                "" if row["recall"] is None else f"{row['recall']:.4f}",
                f"{row['queries_per_second']:,.0f}",
                str(row["num_pairs"]),
            )
        console.print(table)
        for row in rows:
            if row["compared_with"] != "product":
                console.print(describe_ratio(row), highlight=False)
            if row["expected_recall"] is not None:
                console.print(
                    f"{row['name']}: recall of {row['expected_recall']:.4f} expected by the "
                    f"formula for random buckets, {row['recall']:.4f} measured",
                    highlight=False,
                )
        console.print()
    for name, reason in result["unavailable"].items():
        console.print(f"not compared with {name}: {reason}", markup=False, highlight=False)
    console.print(describe_measurement(result), markup=False, highlight=False)


def describe_ratio(row: dict[str, Any]) -> str:
    """How many times as fast one search is as another."""
    return (
        f"{row['name']} is {1 / row['ratio']:.2f} times as fast as {row['compared_with']} "
        f"({row['num_pairs']} pairs)"
    )


def describe_measurement(result: dict[str, Any]) -> str:
    """On what was measured, and how."""
    shape, versions = result["shape"], result["versions"]
    packages = [name for name in ("torch", "faiss-cpu", "scann") if name in versions]
    return (
        f"{shape['num_heads']} heads x {shape['num_queries']:,} queries x {shape['head_dim']} "
        f"dimensions, k = {shape['num_neighbors']}, bf16; medians of interleaved pairs; recall "
        "of the neighbors by fp32 products (exact search selects by bf16 scores); "
        f"{result['processor']}, threads: {result['threads']}, cores: {result['cores']}; "
        + ", ".join(f"{name} {versions[name]}" for name in packages)
    )
