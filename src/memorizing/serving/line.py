"""One thread that runs a model, and the jobs that wait for it: first come, first served."""

from __future__ import annotations

import asyncio
import contextlib
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable
from typing import Any

from memorizing.serving.requests import RequestError


class GivenUp(Exception):
    """Nobody waits for this job any more."""


class OutOfTime(Exception):
    """A job ran for as long as one may."""


class Job:
    """Work for the thread, and what it tells the task that waits.

    Attributes:
        started_s: when it began, by the clock of `time.monotonic`; None as long as it waits.
    """

    def __init__(self, work: Callable[[Job], Any], limit_s: float) -> None:
        """Plan work, in the event loop that will wait for it.

        Args:
            work: called in the thread with the job; it calls `check` often.
            limit_s: how long it may run.
        """
        self.work, self.limit_s = work, limit_s
        self.started_s: float | None = None
        self._events: asyncio.Queue[Any] = asyncio.Queue()
        self._loop = asyncio.get_running_loop()
        self._is_given_up = threading.Event()

    def tell(self, event: Any) -> None:
        """Give the task that waits something; an exception is raised there."""
        # The loop may have ended meanwhile.
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self._events.put_nowait, event)

    async def wait(self) -> Any:
        """What the work tells next.

        Raises:
            RequestError: the work failed.
        """
        event = await self._events.get()
        if isinstance(event, BaseException):
            raise event
        return event

    def give_up(self) -> None:
        """Let it end as soon as it checks."""
        self._is_given_up.set()

    def check(self) -> None:
        """Called by the work, between its steps.

        Raises:
            GivenUp: nobody waits any more.
            OutOfTime: it has run for as long as it may.
        """
        if self._is_given_up.is_set():
            raise GivenUp
        assert self.started_s is not None
        if time.monotonic() - self.started_s > self.limit_s:
            raise OutOfTime


class Line:
    """Jobs one after another in a thread of their own.

    A model's calls share its processors: one after another, each is done as early as it can be.
    """

    def __init__(self, most_waiting: int) -> None:
        """Start the thread.

        Args:
            most_waiting: jobs that may wait besides the one that runs.
        """
        self.most_waiting = most_waiting
        self._waiting: deque[Job] = deque()
        self._running: Job | None = None
        self._is_closed = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="memorizing-model", daemon=True)
        self._thread.start()

    @property
    def num_waiting(self) -> int:
        """Jobs that have not begun."""
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        """1 or 0."""
        return int(self._running is not None)

    def add(self, job: Job) -> None:
        """Let a job wait for its turn.

        Raises:
            RequestError: too many wait already, or it is closed.
        """
        with self._changed:
            if self._is_closed:
                raise _stopped()
            is_free = self._running is None and not self._waiting
            if len(self._waiting) >= self.most_waiting and not is_free:
                raise RequestError(
                    429,
                    f"{len(self._waiting)} requests wait already, as many as may; try again later",
                    code="rate_limit_exceeded",
                )
            self._waiting.append(job)
            self._changed.notify()

    def drop(self, job: Job) -> None:
        """Take a job out of the line, or let it end where it runs."""
        job.give_up()
        with self._changed, contextlib.suppress(ValueError):
            self._waiting.remove(job)

    def close(self) -> None:
        """Give up all jobs, and wait for the thread."""
        with self._changed:
            self._is_closed = True
            for job in (*self._waiting, *([self._running] if self._running else [])):
                job.give_up()
            for job in self._waiting:
                job.tell(_stopped())
            self._waiting.clear()
            self._changed.notify()
        self._thread.join()

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._is_closed)
                if self._is_closed:
                    return
                job = self._running = self._waiting.popleft()
            job.started_s = time.monotonic()
            try:
                job.work(job)
            except GivenUp:
                job.tell(_stopped())
            except RequestError as error:
                job.tell(error)
            except Exception:
                traceback.print_exc(file=sys.stderr)
                job.tell(RequestError(500, "this request failed in the server; see its log"))
            finally:
                with self._changed:
                    self._running = None
                # What it holds is not kept until the next one comes.
                del job


def _stopped() -> RequestError:
    return RequestError(503, "the server stops; try again later")
