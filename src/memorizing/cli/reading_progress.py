"""How far reading is: documents, tokens and tokens per second, on standard error."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from memorizing.cli.output import say
from memorizing.cli.pretrained import show_name

_BYTES_PER_TOKEN = 3.5
"""Of the first document; it is not known before."""
_LINE_EVERY_S = 30.0
"""Where standard error is no terminal, a line so often."""


class ReadingProgress:
    """Counts what is read and shows it."""

    def __init__(self, num_documents: int, num_bytes: int) -> None:
        """Take what there is to read."""
        self.num_tokens = 0
        self._num_documents = num_documents
        self._num_bytes = num_bytes
        self._num_done = -1
        self._bytes_done = 0
        self._bytes_now = 0
        self._tokens_done = 0
        self._bar: Any = None
        self._start = self._said = time.perf_counter()

    @property
    def seconds(self) -> float:
        """Since the start."""
        return time.perf_counter() - self._start

    @property
    def tokens_per_s(self) -> float:
        """Since the start."""
        return self.num_tokens / max(self.seconds, 1e-9)

    def begin(self, name: str, num_bytes: int) -> None:
        """The document before, if any, is done, and this one begins."""
        self._num_done += 1
        self._bytes_done += self._bytes_now
        self._bytes_now = num_bytes
        self._tokens_done = self.num_tokens
        self._show(name)

    def count(self, num_tokens: int) -> None:
        """Tokens were read."""
        self.num_tokens += num_tokens
        self._show(None)

    def describe(self) -> str:
        """The numbers on one line."""
        return (
            f"{max(self._num_done, 0):,} of {self._num_documents:,} documents, "
            f"{self.num_tokens:,} tokens, {self.tokens_per_s:,.0f} tokens/s"
        )

    def _guess_bytes_read(self) -> float:
        """Of the document that is being read, by the bytes of a token so far."""
        bytes_per_token = _BYTES_PER_TOKEN
        if self._tokens_done:
            bytes_per_token = self._bytes_done / self._tokens_done
        read = (self.num_tokens - self._tokens_done) * bytes_per_token
        return min(read, self._bytes_now)

    def _show(self, name: str | None) -> None:
        if self._bar is not None:
            named = {} if name is None else {"name": show_name(name)[-40:]}
            self._bar.update(
                self._bar.task_ids[0],
                completed=self._bytes_done + self._guess_bytes_read(),
                description=self.describe(),
                **named,
            )
        elif time.perf_counter() - self._said >= _LINE_EVERY_S:
            self._said = time.perf_counter()
            say(self.describe())

    @contextmanager
    def watch(self, model: Any) -> Iterator[None]:
        """Count the tokens that go through a model, and show a bar where there is a terminal."""
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

        console = Console(stderr=True)
        columns = (
            BarColumn(bar_width=20),
            TextColumn("{task.description}"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[name]}", markup=False),
        )

        def see(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
            tokens = kwargs.get("input_ids", args[0] if args else None)
            if tokens is not None:
                self.count(tokens.shape[1])

        handle = model.base_model.register_forward_pre_hook(see, with_kwargs=True)
        self._start = self._said = time.perf_counter()
        try:
            if not console.is_terminal:
                yield
                return
            with Progress(*columns, console=console, transient=True) as bar:
                bar.add_task("", total=self._num_bytes, name="")
                self._bar = bar
                yield
        finally:
            self._bar = None
            handle.remove()
