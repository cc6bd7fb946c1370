"""A figure of matplotlib, made without its global state, and written whole."""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING

from memorizing.errors import IndexUnavailableError
from memorizing.storage.files import write_output

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def make_figure(width: float, height: float) -> Figure:
    """An empty figure of so many inches.

    Raises:
        IndexUnavailableError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise IndexUnavailableError(
            'plots need matplotlib, which is not installed; pip install "memorizing[plots]"'
        ) from error
    return Figure(figsize=(width, height), dpi=150, layout="constrained")


def save_figure(figure: Figure, path: str | Path) -> Path:
    """Write a PNG; the folder is made where missing.

    Raises:
        ResourceError: the file cannot be written.
    """
    picture = io.BytesIO()
    figure.savefig(picture, format="png")
    write_output(Path(path), picture.getvalue())
    return Path(path)
