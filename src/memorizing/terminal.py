r"""What a person sees: lines, tables and progress. Nothing that is shown steers the terminal.

Names of documents, runs and files, errors and tokens are data, which somebody else may have
written. So everything is shown by `show`, `say`, a console of `make_console` or a `Display`, and
control characters (also escape sequences, marks that turn the direction of writing, and lone
surrogates, which stand for bytes that are not UTF-8) appear as Python writes them, such as
`\x1b`.
"""

from __future__ import annotations

import functools
import sys
import time
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, final

from memorizing.storage.files import explain_failures

if TYPE_CHECKING:
    from rich.console import Console

LINE_INTERVAL_S = 10.0
PATIENT_INTERVAL_S = 30.0

_VISIBLE = {"Zs", "Cn", "Co"}
"""Categories that `str.isprintable` refuses and no terminal obeys: blanks, private characters, and
those of newer versions of Unicode than Python's."""
_JOINERS = "\u200c\u200d"
"""Which words of several languages are written with."""


def escape(text: str, keep: str = "") -> str:
    """Text on one line, without what would steer the terminal.

    Args:
        text: of whatever source.
        keep: characters that stay as they are, such as line breaks.
    """
    if text.isprintable():
        return text
    return "".join(
        one
        if one.isprintable()
        or one in keep
        or one in _JOINERS
        or unicodedata.category(one) in _VISIBLE
        else one.encode("unicode_escape").decode()
        for one in text
    )


def show(line: str = "") -> None:
    """Write a line to standard output."""
    print(escape(line))


def say(line: str) -> None:
    """Write a line to standard error, which keeps standard output for results."""
    print(escape(line), file=sys.stderr, flush=True)


@functools.cache
def _make_console_class() -> type[Console]:
    from rich.console import Console
    from rich.segment import Segment

    class SafeConsole(Console):
        """Escapes text where it is rendered; colors and moves of the cursor are added later."""

        def render(self, renderable: Any, options: Any = None) -> Iterable[Segment]:
            for text, style, control in super().render(renderable, options):
                yield Segment(text if control else escape(text, "\n"), style, control)

    return SafeConsole


def make_console(**options: Any) -> Console:
    """A console of rich, by its options, that shows data as `escape` has them."""
    return _make_console_class()(**options)


def is_terminal() -> bool:
    """Whether standard error is one."""
    return sys.stderr is not None and sys.stderr.isatty()


class Display:
    """Shows messages and progress; messages also go to the run's log file, with the time.

    This one shows nothing: what is not overridden does nothing.
    """

    def __init__(self) -> None:
        """Show only, until there is a log."""
        self._log_path: Path | None = None
        self._unlogged: list[str] = []
        Display.start(self, 0, 0)

    @final
    def open_log(self, path: Path) -> None:
        """Append messages to a file from now on, and those that were said before."""
        self._log_path = path
        self._append_to_log(self._unlogged)
        self._unlogged = []

    @final
    def say(self, message: str) -> None:
        """Show a message, and append it to the log."""
        line = f"{time.strftime('%Y-%m-%d %H:%M:%S')} {escape(message)}\n"
        if self._log_path is None:
            self._unlogged.append(line)
        else:
            self._append_to_log([line])
        self._show(message)

    def _append_to_log(self, lines: list[str]) -> None:
        assert self._log_path is not None
        with (
            explain_failures(self._log_path),
            self._log_path.open("a", encoding="utf-8") as file,
        ):
            file.writelines(lines)

    def start(self, step: int, total: int | None, unit: str = "step") -> None:
        """Begin to show progress from one step to another, whatever a step is.

        Args:
            step: where it begins.
            total: where it ends; None is not known (yet).
            unit: what a step is called.
        """
        self._first, self._total, self._unit = step, total, unit
        self._start_s = time.monotonic()

    @final
    def update(self, step: int, facts: Mapping[str, str], total: int | None = None) -> None:
        """Show where it is, the newest facts by name, and where it ends if that has changed."""
        self._total = self._total if total is None else total
        self._draw(step, [f"{name} {value}" for name, value in facts.items()])

    def stop(self) -> None:
        """Stop showing progress."""

    def _show(self, message: str) -> None:
        pass

    def _draw(self, step: int, facts: list[str]) -> None:
        pass

    def _tell_left(self, step: int) -> list[str]:
        """What is left if steps take as long as in this session; nothing without a known end."""
        if self._total is None:
            return []
        if step <= self._first:
            return ["? left"]
        step_s = (time.monotonic() - self._start_s) / (step - self._first)
        return [f"{timedelta(seconds=round(step_s * (self._total - step)))} left"]


@final
class SilentDisplay(Display):
    """Shows nothing; the log file is written."""


@final
class LineDisplay(Display):
    """A line every few seconds on standard error, for logs and pipes."""

    def __init__(self, interval_s: float = LINE_INTERVAL_S, *, is_patient: bool = False) -> None:
        """Print at most one line in `interval_s` seconds.

        Args:
            interval_s: between lines.
            is_patient: also wait so long for the first, and print none for the last step.
        """
        super().__init__()
        self._interval_s, self._is_patient = interval_s, is_patient
        self.start(0, 0)

    def start(self, step: int, total: int | None, unit: str = "step") -> None:
        """Begin."""
        super().start(step, total, unit)
        self._shown_s = self._start_s if self._is_patient else -float("inf")

    def _show(self, message: str) -> None:
        say(message)

    def _draw(self, step: int, facts: list[str]) -> None:
        now, total = time.monotonic(), self._total
        is_last = step == total and not self._is_patient
        if now - self._shown_s >= self._interval_s or is_last:
            self._shown_s = now
            place = f"{self._unit} {step:,}" if total is None else f"{self._unit} {step}/{total}"
            say(", ".join([place, *facts, *self._tell_left(step)]))


@final
class BarDisplay(Display):
    """A progress bar that stays in place, with messages above it."""

    def __init__(self, console: Console, *, is_transient: bool = False) -> None:
        """Draw on a terminal.

        Args:
            console: of the terminal.
            is_transient: leave nothing behind.
        """
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

        super().__init__()
        self._progress = Progress(
            # Narrow, so that the facts fit into 80 columns.
            BarColumn(bar_width=8),
            MofNCompleteColumn(),
            TextColumn("{task.description}", markup=False),
            console=console,
            refresh_per_second=4,
            transient=is_transient,
        )
        self._task = self._progress.add_task("starting", total=None, visible=False)

    def start(self, step: int, total: int | None, unit: str = "step") -> None:
        """Draw the bar."""
        super().start(step, total, unit)
        self._progress.update(self._task, total=total, completed=step, visible=True)
        self._progress.start()

    def stop(self) -> None:
        """Leave the bar as it is and give the terminal back."""
        self._progress.stop()

    def _show(self, message: str) -> None:
        # Names of files and documents may hold brackets: no markup.
        self._progress.console.print(message, markup=False, highlight=False)

    def _draw(self, step: int, facts: list[str]) -> None:
        first = ", ".join([self._unit, *self._tell_left(step)])
        description = "\n".join(filter(None, [first, ", ".join(facts)]))
        self._progress.update(
            self._task, completed=step, total=self._total, description=description
        )


def make_display(
    enabled: bool = True, *, is_patient: bool = False, is_transient: bool = False
) -> Display:
    """A bar where standard error is a terminal, lines where it is not, nothing where not wanted.

    Args:
        enabled: whether it is wanted.
        is_patient: lines come only where it takes long.
        is_transient: a bar goes away at the end.
    """
    if not enabled:
        return SilentDisplay()
    if is_terminal():
        return BarDisplay(make_console(stderr=True), is_transient=is_transient)
    return LineDisplay(PATIENT_INTERVAL_S if is_patient else LINE_INTERVAL_S, is_patient=is_patient)


@contextmanager
def show_progress(label: str) -> Iterator[Callable[[int, int], None]]:
    """Show how far something is, where it takes long; gives a function of (done, total)."""
    display = make_display(is_patient=True, is_transient=True)
    display.start(0, None, label)
    try:
        yield lambda done, total: display.update(done, {}, total)
    finally:
        display.stop()
