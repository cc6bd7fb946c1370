"""`memorizing compare`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from memorizing.cli.options import (
    CorpusOption,
    ProbedPrecisionOption,
    TextColumnOption,
    flag,
    option,
    parse_numbers,
    prepare_files,
)
from memorizing.config import Use
from memorizing.errors import ConfigError
from memorizing.terminal import say, show_progress

EXAMPLES = """\b
examples:
  memorizing compare runs/small runs/cache_only --out compare.html
  memorizing compare runs/a runs/b runs/c --use test --capacity 0,512,8192
  memorizing compare runs/small runs/large --corpus files:books --max-tokens 32768
"""


def run(
    runs: Annotated[
        list[Path], typer.Argument(metavar="RUN RUN...", help="Folders of two or more runs.")
    ],
    out: Annotated[
        Path, option("FILE.html", "The page; its charts go beside it as SVG and PNG.")
    ] = Path("compare.html"),
    corpus: CorpusOption = None,
    text_column: TextColumnOption = "text",
    use: Annotated[
        Use | None,
        flag("Documents of the runs' corpus: validation (the default), test, train or all."),
    ] = None,
    capacity: Annotated[
        str | None, option("N,N,...", "Entries of the memory. Default: as each run has them.")
    ] = None,
    documents: Annotated[int, option("N", "Only the first N documents; 0 is all.", min=0)] = 0,
    max_tokens: Annotated[
        int | None, option("N", "Only the first N tokens of each; 0 is all.", min=0)
    ] = None,
    precision: ProbedPrecisionOption = "fp32",
) -> None:
    """Several runs on one page: training curves, perplexity by size of the memory, by position.

    Each run is evaluated on the same documents, a run without memory without one.
    """
    if len(runs) < 2:
        raise ConfigError(f"{len(runs)} run is given; give two or more to compare")
    if out.suffix.lower() not in (".html", ".htm"):
        raise ConfigError(f"--out is {str(out)!r}; the page is an .html file")
    numbers = None if capacity is None else parse_numbers(capacity, "--capacity")
    prepare_files(out, plot=out)

    from memorizing.analysis.comparison import ComparedRun, check_limits, write_comparison
    from memorizing.run_report import report_run
    from memorizing.training import load_model, read_metrics, read_run_config
    from memorizing.training.reporting import METRICS_FILE

    configs = [read_run_config(run_dir) for run_dir in runs]
    if max_tokens is None:
        check_limits(config.evaluation.max_tokens_per_document for config in configs)
    compared = []
    for run_dir, config in zip(runs, configs, strict=True):
        with show_progress(f"evaluating {run_dir.name}") as progress:
            report = report_run(
                run_dir,
                corpus=corpus,
                text_column=text_column,
                use=use,
                capacities=numbers if config.model.has_memory else (0,),
                controls=False,
                num_documents=documents,
                max_tokens=max_tokens,
                precision=precision,
                progress=progress,
            )
        metrics = run_dir / METRICS_FILE
        tokenizer = load_model(run_dir).tokenizer
        compared.append(
            ComparedRun(
                str(run_dir),
                read_metrics(metrics) if metrics.is_file() else [],
                report.results,
                "" if tokenizer is None else tokenizer.fingerprint,
                report.texts,
                report.max_tokens,
            )
        )
    files = write_comparison(compared, out)
    for one in compared:
        for result in one.results.values():
            print(
                f"{one.name}: perplexity {result.perplexity:.3f} with {result.capacity:,} entries"
            )
    say(f"written: {out}, and {len(files)} charts beside it")
