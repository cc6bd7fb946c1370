"""Signals that end a training after the present step."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


@contextmanager
def catch_stop_signals() -> Iterator[list[str]]:
    """Within this context the first SIGINT or SIGTERM only adds its name to the list.

    The second acts as it did before, and the handlers that were there come back at the end.
    Outside the main thread Python allows no handlers: nothing is caught.
    """
    names: list[str] = []
    if threading.current_thread() is not threading.main_thread():
        yield names
        return
    numbers = (signal.SIGINT, signal.SIGTERM)
    previous = {number: signal.getsignal(number) for number in numbers}

    def restore() -> None:
        for number, handler in previous.items():
            # A handler that was not installed from Python reads as None: it cannot be put back.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)

    def note(number: int, frame: FrameType | None) -> None:
        names.append(signal.Signals(number).name)
        restore()

    for number in numbers:
        signal.signal(number, note)
    try:
        yield names
    finally:
        restore()
