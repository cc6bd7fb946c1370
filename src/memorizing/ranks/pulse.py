"""Which ranks are alive, and why the first that ended did so.

A rank that was killed closes its connections, and who waits for it is told that *a* connection is
closed; one that stands still says nothing. So every rank counts up a number in the store that torch
found the ranks with, and looks whether the others' numbers move.
"""

# torch documents its stores, and does not export them.
# pyright: reportPrivateImportUsage=false

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from typing import final

from torch.distributed import PrefixStore, TCPStore

from memorizing.errors import RankError

_FIRST = "left"
"""Key of the words of the rank that ended first."""
_MAIN = "main_left"
"""Key that says that rank 0 ended, and tells its user why."""
_MISSED = 3
"""Beats without which a rank is dead where a connection broke."""
_STORE_TIMEOUT = timedelta(seconds=20)
_ARRIVAL = 4
"""Times the limit for a rank that stands still, a rank may come later than another: on a machine
that is busy or cold it reads its libraries for minutes."""


@final
class Pulse:
    """The beats of this rank and of all others, in a thread of their own."""

    def __init__(self, host: str, port: int, rank: int, size: int, timeout_s: float) -> None:
        """Begin to beat, before torch knows any other rank: one may be gone by then.

        Args:
            host: of the store, which torchrun keeps, or rank 0.
            port: of the store.
            rank: of this process.
            size: ranks in all.
            timeout_s: a rank that does not beat for so long, while another waits, is gone; one that
                never did, after `_ARRIVAL` times as long.

        Raises:
            RankError: the store does not answer.
        """
        self._rank, self._size = rank, size
        self._interval_s = min(1.0, timeout_s / 8)
        self._patience = round(timeout_s / self._interval_s)
        self._missed = [0] * size
        """Per rank, how many looks in a row found the same number. Time does not count: this
        process may have been stopped itself."""
        self._has_come = [False] * size
        self._turns = 0
        self._first: str | None = None
        self._has_main_left = False
        self._last_words: str | None = None
        self._waits = (0, 0)
        """Looks that `check` saw, and how often it saw no more."""
        self._is_over = threading.Event()
        # A launcher that starts all ranks again may keep the store.
        session = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        is_keeper = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
        try:
            if not is_keeper:
                _wait_for_listener(host, port, _ARRIVAL * timeout_s)
            # Torch finds the ranks with a store of the same address: in rank 0, this one.
            store = TCPStore(
                host, port, None, is_keeper, _STORE_TIMEOUT,
                wait_for_workers=False, multi_tenant=True,
            )  # fmt: skip
        except (OSError, RuntimeError) as error:
            cause = f"{host}:{port}: {str(error).partition(chr(10))[0]}"
            raise RankError(
                f"rank 0 of {size} cannot listen ({cause}); give another port"
                if is_keeper
                else f"{self._describe_absent(0)} ({cause})"
            ) from error
        self._store = PrefixStore(f"memorizing/{session}", store)
        self._thread = threading.Thread(target=self._run, name="pulse", daemon=True)
        self._thread.start()

    @property
    def interval_s(self) -> float:
        """Between two beats, and two looks."""
        return self._interval_s

    def _run(self) -> None:
        beats = [b""] * self._size
        names = [f"beat/{rank}" for rank in range(self._size)]
        try:
            while not self._is_over.is_set():
                if self._last_words is not None:
                    self._store.compare_set(_FIRST, "", self._last_words)
                    if self._rank == 0:
                        self._store.set(_MAIN, "1")
                    self._last_words = None
                self._store.set(names[self._rank], str(self._turns))
                if not all(self._has_come):
                    self._has_come = [self._store.check([name]) for name in names]
                here = [
                    name for name, has_come in zip(names, self._has_come, strict=True) if has_come
                ]
                known = dict(zip(here, self._store.multi_get(here), strict=True))
                found = [known.get(name, b"") for name in names]
                self._missed = [
                    count + 1 if beat == before else 0
                    for count, beat, before in zip(self._missed, found, beats, strict=True)
                ]
                beats = found
                if self._first is None and self._store.check([_FIRST]):
                    self._first = self._store.get(_FIRST).decode(errors="replace")
                self._has_main_left = self._has_main_left or self._store.check([_MAIN])
                self._turns += 1
                self._is_over.wait(self._interval_s)
        except RuntimeError:
            pass  # the store is gone: `_turns` stands still, which is what `check` sees

    def check(self) -> None:
        """Look whether it is any use to wait on. Call it once per interval.

        Raises:
            RankError: a rank ended, or does not beat; with its number.
        """
        self._judge(self._patience)

    def explain(self, error: Exception) -> RankError:
        """What it means that a connection to another rank broke: waits until that is known."""
        for _ in range(self._patience):
            time.sleep(self._interval_s)
            try:
                self._judge(_MISSED)
            except RankError as cause:
                return cause
        return RankError(
            f"the connection between the ranks broke, and all still run ({error}); check the "
            "network, and resume from the last checkpoint"
        )

    def _judge(self, patience: int) -> None:
        if self._first is not None:
            raise RankError(self._first)
        turns, stuck = self._waits
        self._waits = (self._turns, stuck + 1 if turns == self._turns else 0)
        if self._waits[1] > patience or not self._thread.is_alive():
            self._missed[0] = self._patience
            raise RankError(self._describe_gone(0, "it keeps the others' addresses"))
        for rank, missed in enumerate(self._missed):
            if rank == self._rank:
                continue
            if not self._has_come[rank]:
                if missed >= _ARRIVAL * self._patience:
                    raise RankError(self._describe_absent(rank))
            elif missed >= patience:
                raise RankError(self._describe_gone(rank, "it was killed, its machine is down, or"))

    def _describe_gone(self, rank: int, why: str) -> str:
        if rank:
            why = f"{why} it has stood still"
        return (
            f"rank {rank} of {self._size} is gone: {why}; see what it printed last. What was saved "
            "is whole: resume goes on from the last checkpoint"
        )

    def _describe_absent(self, rank: int) -> str:
        return (
            f"rank {rank} of {self._size} has not come: it was not started, or ended before it met "
            "the others; see what it printed last, and start all processes with torchrun or "
            "accelerate launch"
        )

    def leave(self, words: str) -> bool:
        """Tell the others why this rank ends, unless another was first.

        Ranks but 0 wait until rank 0 knows, which tells the user: their launcher stops all
        processes when the first one ends.

        Returns:
            Whether another rank, 0, tells it.
        """
        self._last_words = words
        if self._rank == 0:
            self._sleep_until(lambda: self._last_words is None)
            time.sleep(2 * self._interval_s)
            return False
        self._sleep_until(lambda: self._has_main_left or self._missed[0] >= _MISSED)
        if self._has_main_left:
            time.sleep(4 * self._interval_s)
        return self._has_main_left

    def stop(self) -> None:
        """End the beats: this process is about to."""
        self._is_over.set()
        self._thread.join(_MISSED * self._interval_s)

    def _sleep_until(self, is_done: Callable[[], bool]) -> None:
        for _ in range(10 * self._patience):
            if is_done() or not self._thread.is_alive():
                return
            time.sleep(self._interval_s / 10)


def _wait_for_listener(host: str, port: int, limit_s: float) -> None:
    """Wait until somebody listens: torch's own waiting prints much, and heeds no Ctrl-C.

    Raises:
        OSError: nobody does in time.
    """
    end_s = time.monotonic() + limit_s
    while True:
        try:
            socket.create_connection((host, port), timeout=limit_s).close()
            return
        except OSError:
            if time.monotonic() > end_s:
                raise
        time.sleep(0.1)
