"""What a person sees while training runs: a bar on a terminal, some lines elsewhere."""

from __future__ import annotations

import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import final

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from memorizing.storage.files import explain_failures

LINE_INTERVAL_S = 10.0


class Display(ABC):
    """Shows messages and progress; messages also go to the run's log file, with the time."""

    def __init__(self) -> None:
        """Show only, until there is a log."""
        self._log_path: Path | None = None
        self._unlogged: list[str] = []

    @final
    def open_log(self, path: Path) -> None:
        """Append messages to a file from now on, and those that were said before."""
        self._log_path = path
        self._append_to_log(self._unlogged)
        self._unlogged = []

    @final
    def say(self, message: str) -> None:
        """Show a message, and append it to the log."""
        line = f"{time.strftime('%Y-%m-%d %H:%M:%S')} {message}\n"
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

    @abstractmethod
    def _show(self, message: str) -> None: ...

    @abstractmethod
    def start(self, step: int, total: int, unit: str = "step") -> None:
        """Begin to show progress from one step to another, whatever a step is."""

    @abstractmethod
    def update(self, step: int, facts: Mapping[str, str]) -> None:
        """Show where training is, and the newest facts by name."""

    @abstractmethod
    def stop(self) -> None:
        """Stop showing progress."""


@final
class SilentDisplay(Display):
    """Shows nothing; the log file is written."""

    def _show(self, message: str) -> None:
        pass

    def start(self, step: int, total: int, unit: str = "step") -> None:
        """Nothing."""

    def update(self, step: int, facts: Mapping[str, str]) -> None:
        """Nothing."""

    def stop(self) -> None:
        """Nothing."""


@final
class LineDisplay(Display):
    """A line every few seconds on standard error, for logs and pipes."""

    def __init__(self, interval_s: float = LINE_INTERVAL_S) -> None:
        """Print at most one line in `interval_s` seconds, and one for the last step."""
        super().__init__()
        self._interval_s = interval_s
        self._shown_s = -float("inf")
        self._total, self._unit = 0, "step"
        self._clock = _Clock(0, 0)

    def _show(self, message: str) -> None:
        print(message, file=sys.stderr, flush=True)

    def start(self, step: int, total: int, unit: str = "step") -> None:
        """Begin."""
        self._total, self._unit = total, unit
        self._shown_s = -float("inf")
        self._clock = _Clock(step, total)

    def update(self, step: int, facts: Mapping[str, str]) -> None:
        """Print a line when it is time."""
        now = time.monotonic()
        if now - self._shown_s < self._interval_s and step != self._total:
            return
        self._shown_s = now
        left = self._clock.tell_left(step)
        self._show(f"{self._unit} {step}/{self._total}, {_join(facts)}, {left} left")

    def stop(self) -> None:
        """Nothing to close."""


@final
class BarDisplay(Display):
    """A progress bar that stays in place, with messages above it."""

    def __init__(self, console: Console) -> None:
        """Draw on a terminal."""
        super().__init__()
        self._progress = Progress(
            # Narrow, so that the facts fit into 80 columns.
            BarColumn(bar_width=8),
            MofNCompleteColumn(),
            TextColumn("{task.description}"),
            console=console,
            refresh_per_second=4,
        )
        self._task = self._progress.add_task("starting", total=None, visible=False)
        self._clock = _Clock(0, 0)

    def _show(self, message: str) -> None:
        # Names of files and documents may hold brackets: no markup.
        self._progress.console.print(message, markup=False, highlight=False)

    def start(self, step: int, total: int, unit: str = "step") -> None:
        """Draw the bar."""
        self._clock = _Clock(step, total)
        self._progress.update(self._task, total=total, completed=step, visible=True)
        self._progress.start()

    def update(self, step: int, facts: Mapping[str, str]) -> None:
        """Move the bar."""
        self._progress.update(
            self._task,
            completed=step,
            description=f"{self._clock.tell_left(step)} left\n{_join(facts)}",
        )

    def stop(self) -> None:
        """Leave the bar as it is and give the terminal back."""
        self._progress.stop()


class _Clock:
    """Seconds a step took in this session, everything between steps included."""

    def __init__(self, step: int, total: int) -> None:
        self._first, self._total = step, total
        self._start_s = time.monotonic()

    def tell_left(self, step: int) -> str:
        if step <= self._first:
            return "?"
        left_s = (time.monotonic() - self._start_s) / (step - self._first) * (self._total - step)
        return str(timedelta(seconds=round(left_s)))


def make_display(enabled: bool = True) -> Display:
    """A bar where standard error is a terminal, lines where it is not, nothing where not wanted."""
    if not enabled:
        return SilentDisplay()
    return BarDisplay(Console(stderr=True)) if sys.stderr.isatty() else LineDisplay()


def _join(facts: Mapping[str, str]) -> str:
    return ", ".join(f"{name} {value}" for name, value in facts.items())
