"""Break one of two processes that train as one: is anything lost, does it hang, is it wrong?

    python experiments/faults/break_ranks.py --out FILE --times 50       # goes on where it stopped
    python experiments/faults/break_ranks.py --out FILE --times 5 --faults "kill forward" stall

Two children are forked after all imports and run `memorizing train`, as a launcher would start
them; every second time they hold the weights in parts. One of them is broken at a place that is
drawn among all that an unbroken run comes to. Then both must have ended within a minute, the other
one with a message that names it and without a traceback; what is saved must be whole; and
`--resume` in two processes must give the weights and losses of the run that nobody broke, bit for
bit. What was wrong is counted, and its folder stays.

Needs root for a disk that is full, and libfaketime (Debian: faketime) for a clock that jumps.
"""

from __future__ import annotations

import argparse
import atexit
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from kill_writers import describe_run, look_at_run
from tiny import TRAINING, write_texts
from two_ranks import JOINING, PLACES, End, at_call, launch, locate_output, watch

SETTINGS = (*TRAINING, "training.keep_checkpoints=9", "model.num_layers=3")
MOST_S = 60.0
"""From the break to the end of both."""
PAUSE_S = 10.0
JOINING_S = 8
"""The library's limit where one is killed before all have met, who wait four times as long."""
FAKETIME = tuple(Path("/usr/lib").glob("*/faketime/libfaketime.so.1"))
BY_CLOCK = {"FAKETIME_NO_CACHE": "1", "DONT_FAKE_MONOTONIC": "1"}
KINDS = ("whole", "in parts")


class Try(NamedTuple):
    """One run that is broken."""

    folder: Path
    shard: bool
    draw: random.Random
    counts: list[dict[str, int]]
    """By rank, how often an unbroken run comes to a place."""

    def list_command(self, *words: str) -> list[str]:
        """The command that trains."""
        corpus = f"data.corpus=files:{(self.folder.parent / 'texts').resolve()}"
        values = [*SETTINGS, corpus, f"training.shard={str(self.shard).lower()}"]
        settings = [word for value in values for word in ("--set", value)]
        return ["train", "tiny", "--run", str(self.folder / "run"), *settings, *words]

    def break_one(
        self,
        places: tuple[str, ...],
        act: Callable[[], None],
        while_still: Callable[[int, bool], None] | None = None,
        timeout_s: int = 45,
    ) -> tuple[list[End], int]:
        """Act in one process at one of some places: how both ended, and which it was."""
        broken, place = self.draw.randrange(2), self.draw.choice(places)
        number = self.draw.randint(1, self.counts[broken][place])

        def act_and_note() -> None:
            (self.folder.parent / "broken_s").write_text(repr(time.monotonic()))
            act()

        def breaking(rank: int) -> None:
            if rank == broken:
                watch(place, at_call(number, act_and_note))

        command = self.list_command()
        return launch(self.folder, command, breaking, while_still, timeout_s), broken


def signal_self(number: int) -> Callable[[], None]:
    """Sends this process a signal."""
    return lambda: os.kill(os.getpid(), number)


# Faults. Each gives what was seen; an assertion fails where something is wrong.


def check_named(ends: list[End], broken: int, number: int = signal.SIGKILL) -> str:
    """The other process ended with a message that names the broken one."""
    other = ends[1 - broken]
    assert ends[broken].status == -number, "ended otherwise"
    assert other.status == 2, "the other one ended otherwise"
    assert f"rank {broken} of 2 is gone" in other.text, "not named"
    return "named"


def kill(place: str) -> Callable[[Try], tuple[list[End], str]]:
    """SIGKILL at a place."""

    def fault(one: Try) -> tuple[list[End], str]:
        ends, broken = one.break_one((place,), signal_self(signal.SIGKILL))
        return ends, check_named(ends, broken)

    return fault


def kill_joining(one: Try) -> tuple[list[End], str]:
    """SIGKILL before the others know a process, or while they connect."""
    ends, broken = one.break_one((JOINING,), signal_self(signal.SIGKILL), timeout_s=JOINING_S)
    if f"rank {broken} of 2 has not come" in ends[1 - broken].text:
        assert [ends[broken].status, ends[1 - broken].status] == [-signal.SIGKILL, 2], "otherwise"
        return ends, "named as one that has not come"
    return ends, check_named(ends, broken)


def stall(one: Try) -> tuple[list[End], str]:
    """SIGSTOP at any place, until the other one has ended."""
    ends, broken = one.break_one(PLACES, signal_self(signal.SIGSTOP))
    return ends, check_named(ends, broken)


def stall_and_wake(one: Try) -> tuple[list[End], str]:
    """SIGSTOP at any place, and SIGCONT when the other one has ended."""

    def wake(child: int, is_alone: bool) -> None:
        if is_alone:
            os.kill(child, signal.SIGCONT)

    ends, broken = one.break_one(PLACES, signal_self(signal.SIGSTOP), wake)
    assert [end.status for end in ends] == [2, 2], "ended otherwise"
    other, woken = ends[1 - broken], ends[broken]
    assert f"rank {broken} of 2 is gone" in other.text, "not named"
    assert woken.time_s - other.time_s <= MOST_S, "late after it woke up"
    assert "Traceback" not in woken.text, "traceback after it woke up"
    return [other], "named, and the other one ended when it woke up"


def pause(one: Try) -> tuple[list[End], str]:
    """SIGSTOP at any place, and SIGCONT after some seconds."""
    wake_s = list[float]()

    def wake(child: int, is_alone: bool) -> None:
        wake_s[:] = wake_s or [time.monotonic() + PAUSE_S]
        if is_alone or time.monotonic() > wake_s[0]:
            os.kill(child, signal.SIGCONT)

    ends, _ = one.break_one(PLACES, signal_self(signal.SIGSTOP), wake)
    assert [end.status for end in ends] == [0, 0], "ended otherwise"
    return ends, "waited for"


def stop(one: Try) -> tuple[list[End], str]:
    """SIGTERM to one, at any place."""
    ends, broken = one.break_one(PLACES, signal_self(signal.SIGTERM))
    statuses = [end.status for end in ends]
    if ends[broken].status == -signal.SIGTERM and ends[1 - broken].status != 0:
        # Before and after it trains nobody catches it.
        return ends, check_named(ends, broken, signal.SIGTERM)
    if ends[broken].status == -signal.SIGTERM:
        return ends, "ended when all was done"
    was_stopped = "signal to another process: stopped after step" in ends[0].text
    if was_stopped or "SIGTERM: stopped after step" in ends[0].text:
        assert statuses == [130, 130], "stopped, and ended otherwise"
        return ends, "both stopped and saved"
    assert statuses == [0, 0], "ended otherwise"
    return ends, "finished"


def fill_disk(one: Try) -> tuple[list[End], str]:
    """The disk of one (the main process' run, the other one's cache) is full from a place on."""
    places = [one.folder / name for name in ("run", "cache1")]
    num_left = one.draw.choice([0, one.draw.randrange(16)])

    def fill() -> None:
        place = places[int(os.environ["RANK"])]
        free = os.statvfs(place)
        descriptor = os.open(place, os.O_TMPFILE | os.O_RDWR)
        num_bytes = max(0, free.f_bavail - num_left) * free.f_frsize
        os.posix_fallocate(descriptor, 0, max(1, num_bytes))

    for place in places:
        place.mkdir()
        mount = ["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", str(place)]
        subprocess.run(mount, check=True)
    try:
        ends, broken = one.break_one(("disk",), fill)
    finally:
        for place in places:
            shutil.copytree(place, place.with_suffix(".kept"))
            subprocess.run(["umount", str(place)], check=True)
            place.rmdir()
            place.with_suffix(".kept").rename(place)
    statuses = [end.status for end in ends]
    if statuses == [0, 0]:
        return ends, "finished with what was left"
    assert statuses == [2, 2], "ended otherwise"
    assert "error: " not in ends[1].text, "told by the other one"
    assert broken == 0 or "error: rank 1: " in ends[0].text, "not named"
    if "MiB are free" in ends[0].text:
        return ends, "told before it wrote"
    assert "no space left" in ends[0].text, "not told"
    return ends, "told"


def jump_clock(one: Try) -> tuple[list[End], str]:
    """The clock of one process jumps, by up to a year, forwards or backwards."""
    seconds = one.draw.choice([2, 3600, 86400, 31536000])
    jump = f"{one.draw.choice('+-')}{seconds}\n"

    def write() -> None:
        before_s, clock = time.time(), one.folder.parent / "clock"
        clock.write_text(jump)
        os.environ["FAKETIME_TIMESTAMP_FILE"] = str(clock)
        assert abs(abs(time.time() - before_s) - seconds) < 1

    ends, _ = one.break_one(PLACES, write)
    assert [end.status for end in ends] == [0, 0], "ended otherwise"
    return ends, "nothing happened"


def damage(one: Try) -> tuple[list[End], str]:
    """A file of the last checkpoint of a run is cut, changed or gone when it goes on."""
    shutil.copytree(locate_whole(one.folder.parent, one.shard) / "run", one.folder / "run")
    checkpoints = sorted((one.folder / "run" / "checkpoints").glob("step-*"))
    path = one.draw.choice(sorted(checkpoints[-1].iterdir()))
    content = bytearray(path.read_bytes())
    how = one.draw.choice(["cut", "changed", "gone"])
    if how == "gone":
        path.unlink()
    else:
        place = one.draw.randrange(len(content))
        content[place] ^= 1 << one.draw.randrange(8)
        path.write_bytes(content[:place] if how == "cut" else content)
    (one.folder.parent / "broken_s").write_text(repr(time.monotonic()))
    ends = launch(one.folder, one.list_command("--resume"))
    assert [end.status for end in ends] == [0, 0], f"{path.name} {how}, ended otherwise"
    told = " ".join(ends[0].text.split())
    assert f"it goes on from {checkpoints[-2].name} now" in told, f"{path.name} {how}, not told"
    return ends, "told, and goes on from the one before"


FAULTS: dict[str, Callable[[Try], tuple[list[End], str]]] = {
    **{f"kill {place}": kill(place) for place in PLACES[:4]},
    "terminate": stop,
    "full disk": fill_disk,
    "damage": damage,
    "pause": pause,
    "stall": stall,
    "stall, wake": stall_and_wake,
    "kill joining": kill_joining,
    "clock": jump_clock,
}


def locate_whole(root: Path, shard: bool) -> Path:
    """Folder of the run that nobody broke."""
    return root / KINDS[shard]


def train_whole(root: Path, shard: bool) -> list[dict[str, int]]:
    """Train as often as a try does; by rank, how often a process comes to each place."""
    folder = locate_whole(root, shard)
    folder.mkdir()

    def count_all(rank: int) -> None:
        counts = Counter[str]()
        for place in (*PLACES, JOINING):
            watch(place, lambda place=place: counts.update([place]))
        atexit.register(lambda: (folder / f"counts{rank}").write_text(json.dumps(dict(counts))))

    ends = launch(folder, Try(folder, shard, random.Random(), []).list_command(), count_all)
    assert [end.status for end in ends] == [0, 0], ends
    return [json.loads((folder / f"counts{rank}").read_text()) for rank in range(2)]


def try_fault(name: str, one: Try) -> tuple[str, float]:
    """Break a run once: what was seen, and the seconds from the break to the end of both."""
    one.folder.mkdir()
    ends, seen = FAULTS[name](one)
    broken_s = float((one.folder.parent / "broken_s").read_text())
    seconds = max(end.time_s for end in ends) - broken_s
    assert seconds <= MOST_S, f"late: {seconds:.0f} s"
    assert not any("Traceback" in end.text or "frame #" in end.text for end in ends), "traceback"
    look_at_run(one.folder / "run")
    is_run = (one.folder / "run" / "config.toml").is_file()
    again = launch(one.folder, one.list_command(*(("--resume",) if is_run else ())))
    assert [end.status for end in again] == [0, 0], f"does not resume: {again}"
    whole = locate_whole(one.folder.parent, one.shard)
    assert describe_run(one.folder / "run") == describe_run(whole / "run"), "resumed to another"
    return seen, seconds


def try_and_count(name: str, one: Try, counts: dict[str, Any]) -> None:
    """Break a run once, and add to what is known; keep what was wrong beside it."""
    number = counts["times"]
    try:
        seen, seconds = try_fault(name, one)
        counts["seconds"].append(round(seconds, 2))
        shutil.rmtree(one.folder)
    except (AssertionError, OSError) as error:
        seen = f"wrong: {error}"
        kept = one.folder.with_name(f"{name} {KINDS[one.shard]} {number}")
        one.folder.rename(kept)
        for rank in range(2):
            if locate_output(one.folder, rank).exists():
                locate_output(one.folder, rank).rename(kept / f"output{rank}")
        counts["wrong"].append(f"{kept}: {error}")
    counts["times"] += 1
    counts["seen"][seen] = counts["seen"].get(seen, 0) + 1
    print(f"{name} {KINDS[one.shard]} {number}: {seen}", flush=True)


def import_all() -> None:
    """All that a child would."""
    import accelerate.state  # noqa: F401
    import tensorboard.summary.writer.record_writer  # noqa: F401
    import torch
    from torch.distributed.fsdp import fully_shard  # noqa: F401

    import memorizing.cli  # noqa: F401
    import memorizing.training.finetuning  # noqa: F401
    from memorizing.training.run_folder import describe_machine

    torch.set_num_threads(1)
    describe_machine()


def main() -> None:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--times", type=int, default=50, help="of every fault, in all")
    parser.add_argument("--faults", nargs="+", choices=list(FAULTS), default=list(FAULTS))
    parser.add_argument("--minutes", type=float, default=1e9, help="begin nothing after so many")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True, help="JSON file; goes on with it")
    arguments = parser.parse_args()
    end_s = time.monotonic() + 60 * arguments.minutes
    faults = [name for name in arguments.faults if name != "clock"]
    if "LD_PRELOAD" in os.environ:
        # It refuses the sleep of a clock that does not jump.
        time.sleep = lambda seconds: threading.Event().wait(seconds) and None
        faults = arguments.faults
    root = Path(tempfile.mkdtemp(prefix="break_ranks_"))
    # As the command line has it, before torch is imported.
    os.environ.update(OMP_NUM_THREADS="1", TORCH_CPP_LOG_LEVEL="ERROR")
    import_all()
    write_texts(root / "texts")
    places = [train_whole(root, shard) for shard in (False, True)]
    done = json.loads(arguments.out.read_text()) if arguments.out.exists() else {}
    for number in range(arguments.times):
        shard = bool(number % 2)
        for name in faults:
            kind = f"{name}, weights {KINDS[shard]}"
            fresh = {"times": 0, "seconds": [], "seen": {}, "wrong": []}
            counts = done.setdefault(kind, fresh)
            if counts["times"] > number // 2 or time.monotonic() > end_s:
                continue
            draw = random.Random(f"{arguments.seed} {name} {number}")
            try_and_count(name, Try(root / "broken", shard, draw, places[shard]), counts)
            arguments.out.write_text(json.dumps(done, indent=2) + "\n", encoding="utf-8")
    if not any(one["wrong"] for one in done.values()):
        shutil.rmtree(root)
    if faults != arguments.faults and FAKETIME and time.monotonic() < end_s:
        minutes = (end_s - time.monotonic()) / 60
        words = [*sys.argv, "--faults", "clock", "--minutes", str(minutes)]
        os.execve(sys.executable, [sys.executable, *words], os.environ | BY_CLOCK | {
            "LD_PRELOAD": str(FAKETIME[0]),
        })  # fmt: skip


if __name__ == "__main__":
    main()
