"""How long the documents of a corpus are, as a picture: the paper's appendix A."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from memorizing.analysis.figures import make_figure, save_figure

if TYPE_CHECKING:
    from memorizing.data import CorpusStatistics

_COLOR = "#00798c"


def plot_lengths(statistics: CorpusStatistics, path: str | Path) -> Path:
    """Write a PNG with the number of documents by length in tokens, on a logarithmic axis.

    Args:
        statistics: what `measure_corpus` returned.
        path: of the picture; its folder is made where missing.

    Raises:
        IndexUnavailableError: matplotlib is not installed.
        ResourceError: the file cannot be written.
    """
    figure = make_figure(6.4, 3.6)
    axes = figure.subplots()
    begins = [max(item.begin, 0.5) for item in statistics.histogram]
    axes.bar(
        begins,
        [item.num_documents for item in statistics.histogram],
        width=[item.end - begin for item, begin in zip(statistics.histogram, begins, strict=True)],
        align="edge",
        color=_COLOR,
        edgecolor="white",
    )
    axes.set_xscale("log", base=2)
    axes.set_xlabel("tokens per document (log scale)")
    axes.set_ylabel("documents")
    axes.set_title(
        f"{statistics.num_documents:,} documents, {statistics.num_tokens:,} tokens", loc="left"
    )
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    return save_figure(figure, path)
