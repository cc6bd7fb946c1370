"""`memorizing evaluate`."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from memorizing.cli.output import (
    JsonOption,
    parse_numbers,
    prepare_file,
    show_progress,
    write_result,
)
from memorizing.errors import ConfigError, IndexUnavailableError

EXAMPLES = """\b
examples:
  memorizing evaluate runs/small --capacity 0,512,2048,8192,65536
  memorizing evaluate runs/small --controls --against runs/cache_only
  memorizing evaluate runs/small --use test --json test.json --plot test.png
  memorizing evaluate runs/small --corpus files:books --max-tokens 100000
  memorizing evaluate runs/small --capacity 65536 --index faiss_hnsw
"""


class Use(StrEnum):
    """Which documents of the corpus are read."""

    VALIDATION = "validation"
    TEST = "test"
    TRAIN = "train"
    ALL = "all"


class Precision(StrEnum):
    """Dtype of products and activations."""

    AUTO = "auto"
    FP32 = "fp32"
    BF16 = "bf16"


def run(
    run_dir: Annotated[
        Path,
        typer.Argument(metavar="RUN", help="Folder of a run (or, with --corpus, a checkpoint)."),
    ],
    corpus: Annotated[
        str | None,
        typer.Option(metavar="KIND:WHERE", help="Read another corpus (`memorizing info corpora`)."),
    ] = None,
    text_column: Annotated[
        str, typer.Option(metavar="NAME", help="Where jsonl: and parquet: corpora have the text.")
    ] = "text",
    use: Annotated[
        Use | None,
        typer.Option(
            help="Documents of the run's corpus: held out for choices (validation, the default) or "
            "for claims (test), trained on, or all. Of another corpus: all."
        ),
    ] = None,
    capacity: Annotated[
        str | None,
        typer.Option(metavar="N,N,...", help="Entries of the memory. Default: as in the recipe."),
    ] = None,
    controls: Annotated[
        bool,
        typer.Option(
            "--controls", help="Also memory off, another document's memory, values shuffled."
        ),
    ] = False,
    against: Annotated[
        Path | None,
        typer.Option(
            metavar="RUN2",
            help="Compare with this run, token by token; 95% intervals draw documents.",
        ),
    ] = None,
    documents: Annotated[
        int, typer.Option(min=0, metavar="N", help="Only the first N documents; 0 is all.")
    ] = 0,
    max_tokens: Annotated[
        int | None,
        typer.Option(
            min=0,
            metavar="N",
            help="Only the first N tokens of each; 0 is all. Default: as in the recipe.",
        ),
    ] = None,
    rows: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Documents read side by side.")
    ] = None,
    precision: Annotated[
        Precision, typer.Option(help="auto asks a short probe of this machine.")
    ] = Precision.FP32,
    index: Annotated[
        str | None,
        typer.Option(
            metavar="INDEX",
            help="What searches the memory (`memorizing info indexes`). Default: as in the recipe.",
        ),
    ] = None,
    json_file: JsonOption = None,
    plot: Annotated[
        Path | None,
        typer.Option(metavar="FILE.png", help="Draw perplexity against capacity."),
    ] = None,
) -> None:
    """Perplexity and bits per byte over whole documents, with each memory.

    A model that was trained with a small memory can be evaluated with larger ones.
    """
    numbers = None if capacity is None else parse_numbers(capacity, "--capacity")
    prepare_file(json_file)
    if plot is not None:
        if numbers is not None and not any(numbers):
            raise ConfigError(
                f"--plot with --capacity {capacity} has no memory to draw; give a capacity above 0"
            )
        require_matplotlib()
    prepare_file(plot)

    from rich.console import Console

    from memorizing.analysis import (
        describe_reach,
        make_position_table,
        make_result_table,
        plot_capacities,
    )
    from memorizing.run_report import report_run

    with show_progress("evaluating") as progress:
        report = report_run(
            run_dir,
            corpus=corpus,
            text_column=text_column,
            use=use.value if use else None,
            capacities=numbers,
            controls=("off", "other_document", "shuffled") if controls else (),
            against=against,
            num_documents=documents,
            max_tokens=max_tokens,
            rows=rows,
            precision=precision.value,
            index=index,
            progress=progress,
        )
    console = Console()
    for line in report.corpus:
        console.print(line, markup=False, highlight=False)
    baseline = report.baseline
    other = against.name if against else ""
    console.print(
        make_result_table(
            report.results,
            baseline=baseline,
            baseline_name=other,
            differences=report.differences if baseline else None,
        )
    )
    columns = {
        f"{result.capacity:,}": result
        for result in report.results.values()
        if result.control is None
    }
    console.print(make_position_table({**({other: baseline} if baseline else {}), **columns}))
    reach = describe_reach(report.results)
    if reach:
        console.print(reach, highlight=False)
    write_result(json_file, report.to_dict())
    if plot is not None:
        plot_capacities(report.results, plot, baseline=baseline, baseline_name=other)
        console.print(f"written: {plot}", markup=False, highlight=False)


def require_matplotlib() -> None:
    """Find out before the work whether a plot can be drawn after it.

    Raises:
        IndexUnavailableError: matplotlib is not installed.
    """
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise IndexUnavailableError(
            '--plot needs matplotlib, which is not installed; pip install "memorizing[plots]"'
        ) from error
