"""Two processes that train as one, started as a launcher would, and places where one breaks."""

from __future__ import annotations

import atexit
import os
import signal
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kill_writers import run
from processes import count_changes, fork

PLACES = ("forward", "backward", "commit", "checkpoint", "disk")
"""Of the training."""
JOINING = "joining"
"""Before a process knows the others, while it finds them, and while it connects to them."""
LIMIT_S = 300.0
"""From the start of a command to its end; nothing is done to a process before."""


@dataclass(frozen=True)
class End:
    """How a process ended."""

    status: int | None
    """Negative for a signal; None where it had to be killed."""
    text: str
    """What it printed."""
    time_s: float
    """When, by the clock that all processes share."""


def launch(
    folder: Path,
    command: list[str],
    breaking: Callable[[int], None] | None = None,
    while_still: Callable[[int, bool], None] | None = None,
    timeout_s: int = 45,
) -> list[End]:
    """Run a command in two processes, with a cache of their own each.

    Args:
        folder: gets caches and, beside it, what they print.
        command: of the command line.
        breaking: called in each before it starts, with its rank.
        while_still: called again and again with a process that stands still by a signal, and
            whether the other one has ended; by default it is killed then.
        timeout_s: after which one that stands still is gone; by default that of the library.
    """
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    children = []
    for rank in range(2):

        def work(rank: int = rank) -> int:
            os.environ.update(
                RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", LOCAL_WORLD_SIZE="2",
                MASTER_ADDR="localhost", MASTER_PORT=str(port),
                MEMORIZING_CACHE=str(folder / f"cache{rank}"),
                MEMORIZING_RANK_TIMEOUT_S=str(timeout_s),
            )  # fmt: skip
            if breaking is not None:
                breaking(rank)
            status = run(*command)
            atexit._run_exitfuncs()
            return status

        children.append(fork(work, locate_output(folder, rank)))
    return _wait_for_all(children, folder, while_still or _kill_at_the_end)


def locate_output(folder: Path, rank: int) -> Path:
    """Beside the folder, whose disk may be full."""
    return folder.with_name(f"{folder.name}.output{rank}")


def _kill_at_the_end(child: int, is_alone: bool) -> None:
    if is_alone:
        os.kill(child, signal.SIGKILL)


def _wait_for_all(
    children: list[int], folder: Path, while_still: Callable[[int, bool], None]
) -> list[End]:
    limit_s, ends = time.monotonic() + LIMIT_S, dict[int, End]()
    while len(ends) < len(children):
        is_late = time.monotonic() > limit_s
        for rank, child in enumerate(children):
            if rank in ends:
                continue
            if is_late:
                os.kill(child, signal.SIGKILL)
            found, status = os.waitpid(child, 0 if is_late else os.WNOHANG)
            if found:
                text = locate_output(folder, rank).read_text(errors="replace")
                code = None if is_late else os.waitstatus_to_exitcode(status)
                ends[rank] = End(code, text, time.monotonic())
            elif _is_still(child):
                while_still(child, bool(ends))
        time.sleep(0.01)
    return [ends[rank] for rank in range(len(children))]


def _is_still(child: int) -> bool:
    return Path(f"/proc/{child}/stat").read_text().rpartition(")")[2].split()[0] == "T"


def watch(place: str, act: Callable[[], None]) -> None:
    """From now on act every time that this process comes to a place.

    In the main process a checkpoint is a change of the disk while one is written; in the other one
    it is what is sent for it: rows, and weights in parts.
    """
    import accelerate.state
    import torch.distributed.distributed_c10d

    import memorizing.ranks.joining
    from memorizing.memory import Memory
    from memorizing.model.block import Block
    from memorizing.ranks import Ranks, Shards
    from memorizing.training.loop import TrainingLoop

    if place in ("forward", "backward"):
        compute = Block.forward

        def forward(self: Any, *arguments: Any) -> Any:
            if place == "forward":
                act()
            x, result = compute(self, *arguments)
            if place == "backward" and x.requires_grad:
                x.register_hook(lambda _: act())
            return x, result

        Block.forward = forward  # type: ignore[method-assign]
    elif place == "commit":
        # Not that of an evaluation, which is read and gone.
        is_training, append, take_step = [False], Memory.append, TrainingLoop._take_step

        def take_step_and_note(self: Any) -> Any:
            is_training[0] = True
            metrics = take_step(self)
            is_training[0] = False
            return metrics

        def append_and_act(self: Any, *arguments: Any) -> None:
            if is_training[0]:
                act()
            append(self, *arguments)
            if is_training[0]:
                act()

        TrainingLoop._take_step = take_step_and_note  # type: ignore[method-assign]
        Memory.append = append_and_act  # type: ignore[method-assign]
    elif place == JOINING:
        for owner, name in (
            (memorizing.ranks.joining, "Pulse"),
            (accelerate.state, "PartialState"),
            (torch.distributed.distributed_c10d, "_new_process_group_helper"),
        ):
            before_call(owner, name, act)
    elif place == "disk":
        count_changes(lambda _: act())
    elif os.environ["RANK"] == "0":
        is_writing, write = [False], TrainingLoop._write_checkpoint

        def write_checkpoint(self: Any, position: Any) -> Path:
            is_writing[0] = True
            path = write(self, position)
            is_writing[0] = False
            return path

        TrainingLoop._write_checkpoint = write_checkpoint  # type: ignore[method-assign]
        count_changes(lambda _: act() if is_writing[0] else None)
    else:
        for owner in (Ranks, Shards):
            before_call(owner, "_gather", act)


def before_call(owner: Any, name: str, act: Callable[[], None]) -> None:
    """From now on act before a function is called."""
    function = getattr(owner, name)

    def call(*arguments: Any, **options: Any) -> Any:
        act()
        return function(*arguments, **options)

    setattr(owner, name, call)


def at_call(number: int, act: Callable[[], None]) -> Callable[[], None]:
    """Act the given time that the result is called."""
    counted = [0]

    def count() -> None:
        counted[0] += 1
        if counted[0] == number:
            act()

    return count
