"""Several runs on one page: training curves, perplexity against size, and by position."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from memorizing.analysis.charts import draw_lines, embed_figure, encode_figure
from memorizing.analysis.page import render_page
from memorizing.errors import ConfigError
from memorizing.evaluation import EvaluationResult
from memorizing.storage.files import write_output

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class ComparedRun:
    """A run, what its training logged, and what it makes of the documents of all."""

    name: str
    metrics: Sequence[Mapping[str, Any]]
    """Lines of `metrics.jsonl`."""
    results: Mapping[str, EvaluationResult]
    """By capacity as text, rising."""
    tokenizer: str
    """Its fingerprint: perplexities of different ones cannot be compared, bits per byte can."""
    texts: str
    """Of the documents, as `RunReport.texts`."""
    max_tokens: int
    """Of each document; 0 is all."""


def write_comparison(runs: Sequence[ComparedRun], path: Path) -> list[Path]:
    """Write a page, and its charts beside it as SVG and PNG.

    Args:
        runs: two or more, on the same documents.
        path: of the page.

    Returns:
        The files besides the page.

    Raises:
        ConfigError: fewer than two runs, or runs on different documents.
        IndexUnavailableError: matplotlib is not installed.
        ResourceError: a file cannot be written.
    """
    if len(runs) < 2:
        raise ConfigError(f"{len(runs)} run is given; give two or more to compare")
    # Long ones may have been split, each run's by its own tokenizer.
    read = {
        (run.texts, *(document.name for document in result.documents))
        for run in runs
        for result in run.results.values()
    }
    if len(read) > 1:
        raise ConfigError(
            "the runs are measured on different documents; give --corpus, so that all read the same"
        )
    check_limits(run.max_tokens for run in runs)
    is_same = len({run.tokenizer for run in runs}) == 1
    charts = _draw_charts(runs, is_same)
    files = []
    for (name, (figure, _)), kind in itertools.product(charts.items(), ("svg", "png")):
        file = path.with_name(f"{path.stem}_{name}.{kind}")
        write_output(file, encode_figure(figure, kind))
        files.append(file)
    page = render_page(
        "compare.html",
        title="memorizing: runs compared",
        charts=[
            (embed_figure(figure, name), caption) for name, (figure, caption) in charts.items()
        ],
        runs=[(run.name, list(run.results.values())) for run in runs],
        is_same=is_same,
        num_documents=len(read.pop()) - 1,
        max_tokens=runs[0].max_tokens,
        files=[file.name for file in files],
    )
    write_output(path, page)
    return files


def check_limits(limits: Iterable[int]) -> None:
    """Refuse runs that read documents to different lengths; 0 is whole.

    Raises:
        ConfigError: with the lengths.
    """
    found = sorted(set(limits))
    if len(found) > 1:
        raise ConfigError(
            f"the runs' settings read {' and '.join(f'{one:,}' for one in found)} tokens of each "
            "document (0 is all); give --max-tokens, so that all read the same"
        )


def _draw_charts(runs: Sequence[ComparedRun], is_same: bool) -> dict[str, tuple[Figure, str]]:
    charts = {}
    for kind, what in (("train", "Training"), ("validation", "Validation")):
        lines: dict[str, Any] = {}
        for run in runs:
            points = [
                (line["step"], line[kind]["nats_per_token"])
                for line in run.metrics
                if "nats_per_token" in (line.get(kind) or {})
            ]
            if points:
                lines[run.name] = tuple(zip(*points, strict=True))
        if lines:
            figure = draw_lines(lines, "step", "nats a token")
            note = "" if is_same else " Tokens are those of each run's own tokenizer."
            charts[kind] = (figure, f"{what}: loss by step.{note}")
    measure = "perplexity" if is_same else "bits per byte"

    def read(result: EvaluationResult) -> float:
        return result.perplexity if is_same else result.bits_per_byte

    sizes = {
        run.name: (
            [r.capacity for r in run.results.values()],
            list(map(read, run.results.values())),
        )
        for run in runs
        if not any(math.isnan(read(r)) for r in run.results.values())
    }
    if sizes:
        figure = draw_lines(sizes, "entries in memory", measure, marker="o", is_log=True)
        charts["size"] = (figure, f"{measure.capitalize()} against the size of the memory.")
    if is_same:
        positions = {}
        for run in runs:
            largest = list(run.results.values())[-1]
            buckets = largest.by_position()
            positions[run.name] = (
                [f"from {bucket.start:,}" for bucket in buckets],
                [bucket.perplexity for bucket in buckets],
            )
        figure = draw_lines(positions, "position in the document", "perplexity", marker="o")
        charts["position"] = (figure, "Perplexity by position, each run with its largest memory.")
    return charts
