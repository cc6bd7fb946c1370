"""A progress bar for reading."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def show_progress(is_shown: bool) -> Iterator[Callable[[str, int], None]]:
    """Show how many tokens were read, how fast, and of which document; gives what counts them."""
    from rich.console import Console
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    console = Console(stderr=True)
    if not is_shown or not console.is_terminal:
        yield lambda name, count: None
        return
    columns = (
        SpinnerColumn(),
        TextColumn("{task.completed:,.0f} tokens"),
        TextColumn("{task.fields[speed]}"),
        TimeElapsedColumn(),
        TextColumn("{task.description}", markup=False),
    )
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("", total=None, speed="")

        def advance(name: str, count: int) -> None:
            bar.update(task, advance=count, description=name[-60:])
            elapsed = bar.tasks[0].elapsed
            if elapsed:
                bar.update(task, speed=f"{bar.tasks[0].completed / elapsed:,.0f}/s")

        yield advance
