"""`memorizing evaluate`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from memorizing.cli.options import (
    CorpusOption,
    JsonOption,
    ProbedPrecisionOption,
    RunArgument,
    TextColumnOption,
    flag,
    option,
    parse_numbers,
    prepare_files,
    write_result,
)
from memorizing.config import Use
from memorizing.errors import ConfigError
from memorizing.terminal import make_console, show_progress

EXAMPLES = """\b
examples:
  memorizing evaluate runs/small --capacity 0,512,2048,8192,65536
  memorizing evaluate runs/small --controls --against runs/cache_only
  memorizing evaluate runs/small --use test --json test.json --plot test.png
  memorizing evaluate runs/small --corpus files:books --max-tokens 100000
  memorizing evaluate runs/small --capacity 65536 --index faiss_hnsw
"""


def run(
    run_dir: RunArgument,
    corpus: CorpusOption = None,
    text_column: TextColumnOption = "text",
    use: Annotated[
        Use | None,
        flag(
            "Documents of the run's corpus: held out for choices (validation, the default) or for "
            "claims (test), trained on, or all. Of another corpus: all."
        ),
    ] = None,
    capacity: Annotated[
        str | None, option("N,N,...", "Entries of the memory. Default: as in the recipe.")
    ] = None,
    controls: Annotated[
        bool | None,
        flag(
            "Also memory off, another document's memory, values shuffled. Default: those that the "
            "recipe names.",
            "--controls/--no-controls",
            show_default=False,
        ),
    ] = None,
    against: Annotated[
        Path | None,
        option("RUN2", "Compare with this run, token by token; 95% intervals draw documents."),
    ] = None,
    documents: Annotated[int, option("N", "Only the first N documents; 0 is all.", min=0)] = 0,
    max_tokens: Annotated[
        int | None,
        option("N", "Only the first N tokens of each; 0 is all. Default: as in the recipe.", min=0),
    ] = None,
    rows: Annotated[int | None, option("N", "Documents read side by side.", min=1)] = None,
    precision: ProbedPrecisionOption = "fp32",
    index: Annotated[
        str | None,
        option(
            "INDEX",
            "What searches the memory (`memorizing info indexes`). Default: as in the recipe.",
        ),
    ] = None,
    json_file: JsonOption = None,
    plot: Annotated[Path | None, option("FILE.png", "Draw perplexity against capacity.")] = None,
) -> None:
    """Perplexity and bits per byte over whole documents, with each memory.

    A model that was trained with a small memory can be evaluated with larger ones.
    """
    numbers = None if capacity is None else parse_numbers(capacity, "--capacity")
    if plot is not None and numbers is not None and not any(numbers):
        raise ConfigError(
            f"--plot with --capacity {capacity} has no memory to draw; give a capacity above 0"
        )
    prepare_files(json_file, plot=plot)

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
            use=use,
            capacities=numbers,
            controls=controls,
            against=against,
            num_documents=documents,
            max_tokens=max_tokens,
            rows=rows,
            precision=precision,
            index=index,
            progress=progress,
        )
    console = make_console()
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
