"""Work in forked children, which are killed, or watched for what they must not do."""

from __future__ import annotations

import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

CHANGES = ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.truncate", "os.link", "os.symlink")
"""Audit events of calls that change what stands on the disk, besides opening for writing."""


def fork(work: Callable[[], int | None], output: Path) -> int:
    """Do something in a child that leads a group of its own; what it prints goes to a file."""
    child = os.fork()
    if child:
        return child
    status = 70
    try:
        os.setsid()
        descriptor = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        status = work() or 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def count_changes(callback: Callable[[int], None]) -> None:
    """From now on call back before every change of the disk that this process makes."""
    number = 0
    sync = os.fsync

    def count() -> None:
        nonlocal number
        number += 1
        callback(number)

    def watch(event: str, arguments: tuple[object, ...]) -> None:
        is_write = event == "open" and int(str(arguments[2])) & (os.O_WRONLY | os.O_RDWR)
        if is_write or event in CHANGES:
            count()

    def count_sync(descriptor: int) -> None:
        count()
        sync(descriptor)

    os.fsync = count_sync
    sys.addaudithook(watch)


def kill_at_change(step: int) -> None:
    """End this process by SIGKILL before the given one of its changes of the disk."""

    def kill(number: int) -> None:
        if number >= step:
            os.kill(os.getpid(), signal.SIGKILL)

    count_changes(kill)


def kill_group(child: int) -> None:
    """SIGKILL to a child and all that it started; collects its status."""
    try:
        os.killpg(child, signal.SIGKILL)
    except ProcessLookupError:
        # Before `setsid` the child leads no group.
        os.kill(child, signal.SIGKILL)


def wait(child: int, limit_s: float) -> int | None:
    """The exit status, negative for a signal; None where it did not end in time and was killed."""
    end_s = time.monotonic() + limit_s
    while True:
        found, status = os.waitpid(child, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() > end_s:
            kill_group(child)
            os.waitpid(child, 0)
            return None
        time.sleep(0.005)
