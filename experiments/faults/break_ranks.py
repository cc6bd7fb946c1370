"""Break one of two processes that train as one: is anything lost, does it hang, is it wrong?

    python experiments/faults/break_ranks.py --out FILE --times 50       # goes on where it stopped
    python experiments/faults/break_ranks.py --out FILE --times 5 --faults "kill forward" stall

Two children are forked after all imports and run `memorizing train`, as a launcher would start
them; every second time they hold the weights in parts. One of them is broken at a place that is
drawn. Then the other one must have ended within a limit, with a message that names it; what is
saved must be whole, and hold all steps that were finished; and `--resume` in two processes must
give the weights and losses of a run that nobody broke, bit for bit.

Needs root for a disk that is full, and libfaketime (Debian: faketime) for a clock that jumps.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kill_writers import describe_run, look_at_run, run
from processes import count_changes, fork
from tiny import TRAINING, write_texts

NUM_STEPS, NUM_LAYERS = 4, 3
TIMEOUT_S = 20
"""After which a process that stands still is named; on a busy machine one may rest for seconds."""
LIMIT_S = 300.0
"""From the start of a command to its end."""
SETTINGS = (*TRAINING, "training.keep_checkpoints=9", f"model.num_layers={NUM_LAYERS}")
FAKETIME = tuple(Path("/usr/lib").glob("*/faketime/libfaketime.so.1"))


@dataclass(frozen=True)
class End:
    """How a process ended."""

    status: int | None
    """Negative for a signal; None where it had to be killed."""
    text: str
    seconds: float


def list_command(folder: Path, shard: bool, *words: str) -> list[str]:
    """The command that trains."""
    corpus = f"data.corpus=files:{(folder.parent / 'texts').resolve()}"
    values = [*SETTINGS, corpus, f"training.shard={str(shard).lower()}"]
    settings = [word for value in values for word in ("--set", value)]
    return ["train", "tiny", "--run", str(folder / "run"), *settings, *words]


def describe_launch() -> list[dict[str, str]]:
    """What a launcher sets for each of two processes."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    return [
        {
            "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2",
            "MASTER_ADDR": "localhost", "MASTER_PORT": str(port),
            "MEMORIZING_RANK_TIMEOUT_S": str(TIMEOUT_S),
        }
        for rank in range(2)
    ]  # fmt: skip


def launch(
    folder: Path,
    command: list[str],
    breaking: Callable[[int], None] | None = None,
    meanwhile: Callable[[list[int]], None] | None = None,
) -> list[End]:
    """Run a command in two processes.

    Args:
        folder: gets what they print.
        command: of the command line.
        breaking: called in each before it starts, with its rank.
        meanwhile: called here, with the processes, when they have started.
    """
    children = []
    for rank, values in enumerate(describe_launch()):

        def work(rank: int = rank, values: dict[str, str] = values) -> int:
            os.environ.update(values)
            if breaking is not None:
                breaking(rank)
            status = run(*command)
            import atexit

            atexit._run_exitfuncs()
            return status

        children.append(fork(work, folder / f"output{rank}"))
    if meanwhile is not None:
        meanwhile(children)
    return wait_for_all(children, folder)


def wait_for_all(children: list[int], folder: Path) -> list[End]:
    """How two processes ended; one that stands still is killed when the other has ended."""
    start_s, ends = time.monotonic(), dict[int, End]()
    while len(ends) < len(children):
        late = time.monotonic() - start_s > LIMIT_S
        for rank, child in enumerate(children):
            if rank in ends:
                continue
            found, status = os.waitpid(child, os.WNOHANG)
            if found:
                text = (folder / f"output{rank}").read_text(errors="replace")
                code = os.waitstatus_to_exitcode(status)
                ends[rank] = End(code, text, time.monotonic() - start_s)
            elif late or (ends and is_stopped(child)):
                os.kill(child, signal.SIGKILL)
                if late:
                    os.waitpid(child, 0)
                    ends[rank] = End(None, "", LIMIT_S)
        time.sleep(0.01)
    return [ends[rank] for rank in range(len(children))]


def is_stopped(child: int) -> bool:
    """Whether a process stands still by a signal."""
    return Path(f"/proc/{child}/stat").read_text().rpartition(")")[2].split()[0] == "T"


# Places where a process breaks.


def at_call(number: int, act: Callable[[], None]) -> Callable[[], None]:
    """Act the given time that the result is called."""
    counted = [0]

    def count() -> None:
        counted[0] += 1
        if counted[0] == number:
            act()

    return count


def break_at(place: str, draw: random.Random, act: Callable[[], None]) -> None:
    """From now on act at a place of the training, at a step that is drawn."""
    from memorizing.memory import Memory
    from memorizing.model.block import Block
    from memorizing.ranks import Ranks

    if place in ("forward", "backward"):
        # Evaluations too compute forward; only half as many layers compute backward.
        count = at_call(draw.randint(1, NUM_STEPS * NUM_LAYERS), act)
        compute = Block.forward

        def forward(self: Any, *arguments: Any) -> Any:
            if place == "forward":
                count()
            x, result = compute(self, *arguments)
            if place == "backward" and x.requires_grad:
                x.register_hook(lambda _: count())
            return x, result

        Block.forward = forward  # type: ignore[method-assign]
    elif place == "commit":
        append, count = Memory.append, at_call(draw.randint(1, NUM_STEPS), act)

        def append_and_break(self: Any, *arguments: Any) -> None:
            append(self, *arguments)
            count()

        Memory.append = append_and_break  # type: ignore[method-assign]
    elif os.environ["RANK"] == "0":
        count = at_call(draw.randint(1, NUM_CHANGES), act)
        count_changes(lambda _: count())
    else:
        gather, count = Ranks._gather, at_call(draw.randint(1, 2 * NUM_STEPS), act)

        def gather_and_break(self: Any, data: Any) -> Any:
            count()
            return gather(self, data)

        Ranks._gather = gather_and_break  # type: ignore[method-assign]


NUM_CHANGES = 260
"""Of the disk by the main process, about: one that is drawn beyond them breaks nothing."""


def signal_self(number: int) -> Callable[[], None]:
    """Sends this process a signal."""
    return lambda: os.kill(os.getpid(), number)


# Faults. Each gives what was seen; an assertion fails where something is wrong.


def break_one(
    folder: Path, shard: bool, draw: random.Random, place: str, number: int
) -> tuple[list[End], int]:
    """A signal to one process at a place: how both ended, and which it was."""
    broken = draw.randrange(2)

    def breaking(rank: int) -> None:
        if rank == broken:
            break_at(place, draw, signal_self(number))

    return launch(folder, list_command(folder, shard), breaking), broken


def check_named(ends: list[End], broken: int, number: int = signal.SIGKILL) -> str:
    """The other process ended with a message that names the broken one."""
    if [end.status for end in ends] == [0, 0]:
        return "came too late"
    other = ends[1 - broken]
    assert ends[broken].status == -number, ends
    assert other.status == 2, ends
    assert f"rank {broken} of 2 is gone" in other.text, ends
    return "named"


def kill(place: str) -> Callable[[Path, bool, random.Random], str]:
    """SIGKILL at a place."""

    def fault(folder: Path, shard: bool, draw: random.Random) -> str:
        ends, broken = break_one(folder, shard, draw, place, signal.SIGKILL)
        return check_named(ends, broken)

    return fault


def stall(folder: Path, shard: bool, draw: random.Random) -> str:
    """SIGSTOP at any place."""
    place = draw.choice(["forward", "backward", "commit", "checkpoint"])
    ends, broken = break_one(folder, shard, draw, place, signal.SIGSTOP)
    return check_named(ends, broken)


def stop(folder: Path, shard: bool, draw: random.Random) -> str:
    """SIGTERM to one, at any place."""
    place = draw.choice(["forward", "backward", "commit", "checkpoint"])
    ends, broken = break_one(folder, shard, draw, place, signal.SIGTERM)
    if ends[broken].status == -signal.SIGTERM:
        # Before it trains nobody catches it.
        return check_named(ends, broken, signal.SIGTERM)
    is_stopped = "SIGTERM: stopped after step" in ends[0].text or (
        "a signal to another process: stopped after step" in ends[0].text
    )
    assert [end.status for end in ends] == [130 if is_stopped else 0] * 2, ends
    return "both stopped and saved" if is_stopped else "finished"


def fill_disk(folder: Path, shard: bool, draw: random.Random) -> str:
    """The disk of the run, which the main process writes, is full after some bytes."""
    place = folder / "run"
    place.mkdir()
    # Some 4 MiB have to be free besides what a checkpoint needs.
    size = draw.randrange(64, 8 * 1024)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}k", "tmpfs", str(place)], check=True)
    try:
        ends = launch(folder, list_command(folder, shard))
        kept = folder / "kept"
        shutil.copytree(place, kept)
    finally:
        subprocess.run(["umount", str(place)], check=True)
    place.rmdir()
    kept.rename(place)
    if [end.status for end in ends] == [0, 0]:
        return "came too late"
    assert [end.status for end in ends] == [2, 2], ends
    assert "error: " not in ends[1].text, ends
    if "MiB are free" in ends[0].text:
        return "told by the main process, before it wrote"
    assert "no space left" in ends[0].text, ends
    return "told by the main process"


def jump_clock(folder: Path, shard: bool, draw: random.Random) -> str:
    """The clock of one process jumps, by up to a year, forwards or backwards."""
    if not FAKETIME:
        return "not tried: libfaketime is not installed"
    jumps = folder / "clock"
    jumps.write_text("+0\n")
    broken, children = draw.randrange(2), []
    for rank, values in enumerate(describe_launch()):
        if rank == broken:
            values |= {
                "LD_PRELOAD": str(FAKETIME[0]), "FAKETIME_TIMESTAMP_FILE": str(jumps),
                "FAKETIME_NO_CACHE": "1", "DONT_FAKE_MONOTONIC": "1",
            }  # fmt: skip
        with (folder / f"output{rank}").open("w") as output:
            words = [sys.executable, "-m", "memorizing", *list_command(folder, shard)]
            child = subprocess.Popen(
                words, env=os.environ | values, stdout=output, stderr=subprocess.STDOUT
            )
            children.append(child.pid)
    deadline_s = time.monotonic() + LIMIT_S
    while not (folder / "run" / "run.json").exists() and time.monotonic() < deadline_s:
        time.sleep(0.01)
        if draw.random() < 0.002:
            break
    jumps.write_text(f"{draw.choice('+-')}{draw.choice([2, 3600, 86400, 31536000])}\n")
    ends = wait_for_all(children, folder)
    assert [end.status for end in ends] == [0, 0], ends
    return "nothing happened"


def damage(folder: Path, shard: bool, draw: random.Random) -> str:
    """A file of the last checkpoint of a run is cut, changed or gone when it goes on."""
    shutil.copytree(folder.parent / f"whole{int(shard)}" / "run", folder / "run")
    checkpoint = sorted((folder / "run" / "checkpoints").glob("step-*"))[-1]
    path = draw.choice(sorted(checkpoint.iterdir()))
    content = bytearray(path.read_bytes())
    how = draw.choice(["cut", "changed", "gone"])
    if how == "gone":
        path.unlink()
    else:
        place = draw.randrange(len(content))
        content[place] ^= 1 << draw.randrange(8)
        path.write_bytes(content[:place] if how == "cut" else content)
    ends = launch(folder, list_command(folder, shard, "--resume"))
    assert [end.status for end in ends] == [0, 0], (path, how, ends)
    told = " ".join(ends[0].text.split())
    assert f"it goes on from step-{NUM_STEPS - 1:06d} now" in told, (path, how, ends)
    return f"told, and goes on from the one before ({how})"


FAULTS: dict[str, Callable[[Path, bool, random.Random], str]] = {
    **{f"kill {place}": kill(place) for place in ("forward", "backward", "commit", "checkpoint")},
    "terminate": stop,
    "stall": stall,
    "full disk": fill_disk,
    "clock": jump_clock,
    "damage": damage,
}


def try_fault(name: str, number: int, root: Path, seed: int) -> tuple[str, float]:
    """Break a run once: what was seen, and after how many seconds all had ended."""
    draw, shard = random.Random(f"{seed} {name} {number}"), bool(number % 2)
    folder, whole = root / "broken", root / f"whole{int(shard)}"
    folder.mkdir()
    start_s = time.monotonic()
    seen = FAULTS[name](folder, shard, draw)
    seconds = time.monotonic() - start_s
    look_at_run(folder / "run")
    if seen.startswith("not tried"):
        shutil.rmtree(folder)
        return seen, seconds
    is_run = (folder / "run" / "config.toml").is_file()
    words = ("--resume",) if is_run else ()
    ends = launch(folder, list_command(folder, shard, *words))
    assert [end.status for end in ends] == [0, 0], ends
    found, wanted = (describe_run(one / "run") for one in (folder, whole))
    assert found == wanted, (found, wanted)
    shutil.rmtree(folder)
    return seen, seconds


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
    root = Path(tempfile.mkdtemp(prefix="break_ranks_"))
    os.environ |= {"MEMORIZING_CACHE": str(root / "cache"), "OMP_NUM_THREADS": "1"}
    import accelerate.state  # noqa: F401
    import tensorboard.summary.writer.record_writer  # noqa: F401
    import torch
    from torch.distributed.fsdp import fully_shard  # noqa: F401

    import memorizing.cli
    import memorizing.training.finetuning  # noqa: F401

    torch.set_num_threads(1)
    write_texts(root / "texts")
    for shard in (False, True):
        folder = root / f"whole{int(shard)}"
        folder.mkdir()
        ends = launch(folder, list_command(folder, shard))
        assert [end.status for end in ends] == [0, 0], ends
    done = json.loads(arguments.out.read_text()) if arguments.out.exists() else {}
    for number in range(arguments.times):
        for name in arguments.faults:
            counts = done.setdefault(name, {"times": 0, "longest_s": 0.0, "seen": {}})
            if counts["times"] > number or time.monotonic() > end_s:
                continue
            seen, seconds = try_fault(name, number, root, arguments.seed)
            counts["times"] += 1
            counts["longest_s"] = max(counts["longest_s"], round(seconds, 1))
            counts["seen"] = dict(sorted((Counter(counts["seen"]) + Counter([seen])).items()))
            arguments.out.write_text(json.dumps(done, indent=2) + "\n", encoding="utf-8")
            print(f"{name} {number}: {seen}, {seconds:.1f} s", flush=True)
    shutil.rmtree(root)


if __name__ == "__main__":
    main()
