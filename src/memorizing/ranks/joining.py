"""Becoming one of several processes, as the environment says that a launcher set."""

from __future__ import annotations

import atexit
import os
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from memorizing.devices import find_device
from memorizing.errors import ConfigError, IndexUnavailableError, RankError
from memorizing.ranks.group import ALONE, Ranks
from memorizing.ranks.pulse import Pulse

if TYPE_CHECKING:
    from accelerate.state import PartialState

TIMEOUT_VARIABLE = "MEMORIZING_RANK_TIMEOUT_S"
TIMEOUT_S = 45.0
"""A rank that stands still for so long, while others wait for it, ends the run."""
_NEEDED = ("RANK", "MASTER_ADDR", "MASTER_PORT")
_FAILED_STATUS = 2
"""As the command line has it for what a user can mend."""
_FOREVER = timedelta(days=365)
"""Torch's own limit, which cannot tell a rank that is busy from one that is gone; `Pulse` can."""

_joined: list[Ranks] = []
"""This process among the others, once it is: torch has one group per process."""
_open: list[Ranks] = []
"""The same, within `join_ranks`."""


def find_world() -> int:
    """How many processes the launcher of this one started: 1 without a launcher."""
    words = os.environ.get("WORLD_SIZE", "1")
    is_complete = all(os.environ.get(name) for name in _NEEDED)
    return int(words) if is_complete and words.isdecimal() else 1


@contextmanager
def join_ranks(device: torch.device | str | None = None) -> Iterator[Ranks]:
    """Within this context the processes of a launcher work as one; without a launcher, `ALONE`.

    An error in the outermost context ends the other ranks too: the next time they wait for this
    one, they raise it as their own.

    Args:
        device: where to compute; None is CUDA where there is one, a GPU per process.

    Raises:
        ConfigError: fewer GPUs than processes.
        IndexUnavailableError: accelerate is not installed.
        RankError: the others are not reached.
    """
    if find_world() == 1 or _open:
        yield _open[0] if _open else ALONE
        return
    if not _joined:
        _joined.append(_join(find_device(device)))
    (ranks,) = _joined
    _open.append(ranks)
    try:
        yield ranks
        ranks.wait()
    except BaseException as error:
        ranks.leave(error)
        raise
    finally:
        _open.clear()


def _join(device: torch.device) -> Ranks:
    try:
        from accelerate.state import PartialState
    except ImportError as error:
        raise IndexUnavailableError(
            "several processes need accelerate, which is not installed; "
            'pip install "memorizing[trainer]"'
        ) from error
    timeout_s = _read_timeout()
    num_here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    is_cpu = device.type == "cpu"
    if device.type == "cuda" and num_here > torch.cuda.device_count():
        raise ConfigError(
            f"{num_here} processes were started on a machine with {torch.cuda.device_count()} "
            "GPUs; start one per GPU, or set CUDA_VISIBLE_DEVICES= to compute on the CPU"
        )
    rank, size = int(os.environ["RANK"]), find_world()
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    pulse = Pulse(host, port, rank, size, timeout_s)

    def start_group() -> PartialState:
        backend = "gloo" if is_cpu else "cuda:nccl,cpu:gloo"
        return PartialState(cpu=is_cpu, backend=backend, timeout=_FOREVER)

    with warnings.catch_warnings():
        # The number of threads that it takes where none is set is right.
        warnings.filterwarnings("ignore", message="OMP_NUM_THREADS")
        try:
            state = _do_watched(start_group, pulse)
        except RankError as error:
            pulse.leave(str(error))
            atexit.register(_end_at_once, pulse)
            raise
    place = device if is_cpu or state.device is None else state.device
    if place.type == "cuda":
        torch.cuda.set_device(place)  # of this thread
    ranks = Ranks(rank, size, place, pulse, num_here)
    atexit.register(_end, ranks, pulse)
    return ranks


def _do_watched(work: Callable[[], PartialState], pulse: Pulse) -> PartialState:
    """Do what ends only when all ranks do it, in a thread, and look meanwhile if they are alive.

    Raises:
        RankError: one is not, or has not come.
    """
    results: list[PartialState] = []
    errors: list[Exception] = []

    def do() -> None:
        try:
            results.append(work())
        except Exception as error:
            errors.append(error)

    thread = threading.Thread(target=do, name="joining", daemon=True)
    thread.start()
    while thread.is_alive():
        thread.join(pulse.interval_s)
        if thread.is_alive():
            pulse.check()
    for error in errors:
        raise pulse.explain(error) if isinstance(error, RuntimeError) else error
    return results[0]


def _end(ranks: Ranks, pulse: Pulse) -> None:
    if ranks.has_failed:
        _end_at_once(pulse)
    pulse.stop()
    dist.destroy_process_group()


def _end_at_once(pulse: Pulse) -> None:
    """Torch would wait, at exit, for what a rank that is gone does not send."""
    pulse.stop()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(_FAILED_STATUS)


def _read_timeout() -> float:
    text = os.environ.get(TIMEOUT_VARIABLE, "")
    try:
        seconds = float(text or TIMEOUT_S)
    except ValueError:
        seconds = 0.0
    if not 1 <= seconds < float("inf"):
        raise ConfigError(f"{TIMEOUT_VARIABLE} is {text!r}; allowed: seconds from 1 on, such as 45")
    return seconds
