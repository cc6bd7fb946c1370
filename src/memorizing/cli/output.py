"""What the verbs share: statuses, options, JSON files, messages and progress."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from memorizing.errors import ConfigError, ResourceError
from memorizing.storage.files import encode_json, write_output

INTERRUPTED_STATUS = 130
"""Exit status after Ctrl-C, as shells have it."""

JsonOption = Annotated[
    Path | None, typer.Option("--json", metavar="FILE", help="Also write the result as JSON.")
]


def say(message: str) -> None:
    """Write a line to standard error, which keeps standard output for results."""
    print(message, file=sys.stderr, flush=True)


def prepare_file(path: Path | None) -> None:
    """Make the folder of a file that is written at the end, so that no long run ends in an error.

    Raises:
        ResourceError: the folder cannot be made, or the path is a folder.
    """
    if path is None:
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ResourceError(
            f"cannot make the folder of {str(path)!r}: {error.strerror}; choose another place"
        ) from error
    if path.is_dir():
        raise ResourceError(f"{str(path)!r} is a folder; give the name of a file in it")


def write_result(path: Path | None, values: dict[str, Any]) -> None:
    """Write what a verb reports where `--json` says, and say so.

    Raises:
        ResourceError: the file cannot be written.
    """
    if path is None:
        return
    write_output(path, encode_json(values))
    say(f"written: {path}")


def parse_numbers(text: str, option: str) -> list[int]:
    """Whole numbers with commas between them; `8_192` is allowed.

    Raises:
        ConfigError: anything else, or a negative number.
    """
    try:
        numbers = [int(part) for part in text.split(",")]
    except ValueError:
        numbers = []
    if not numbers or min(numbers) < 0:
        example = "whole numbers from 0 on with commas between, such as 0,512,8192"
        raise ConfigError(f"{option} is {text!r}; allowed: {example}")
    return numbers


@contextmanager
def show_progress(label: str) -> Iterator[Callable[[int, int], None]]:
    """A bar on standard error where that is a terminal; gives a function of (done, total)."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn())
    with Progress(
        *columns, console=console, transient=True, disable=not console.is_terminal
    ) as bar:
        task = bar.add_task(label, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)
