"""Run as a program: writers that are killed at every step, and readers beside a writer.

Processes are forked, so that torch is imported once. Prints what was done; an assertion that fails
ends it with another status than 0.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from memorizing.errors import MemoryFolderError
from memorizing.memory import MemoryFolder
from memorizing.memory.disk import state
from tests.memory.disk.examples import append, check_holds, describe, make_folder

BEFORE = ["a", "b", "c", "d", "e"]
STEPS = ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.truncate", "fcntl.flock", "os.fsync")


def fork(work: Callable[[], object]) -> int:
    """Do something in a child, which ends with status 0 if nothing was raised."""
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        work()
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)


def kill_before(step: int) -> None:
    """End this process before the given one of its calls that change something on the disk."""
    left = [step]
    sync = os.fsync

    def count(event: str, arguments: tuple[object, ...]) -> None:
        writes = event == "open" and int(str(arguments[2])) & (os.O_WRONLY | os.O_RDWR)
        if writes or event in STEPS:
            left[0] -= 1
            if left[0] < 0:
                os.kill(os.getpid(), signal.SIGKILL)

    def count_sync(descriptor: int) -> None:
        count("os.fsync", ())
        sync(descriptor)

    os.fsync = count_sync
    sys.addaudithook(count)


def append_two(path: Path) -> None:
    append(MemoryFolder.open(path), ["f", "g"], keep_text=True)


def forget_two(path: Path) -> None:
    MemoryFolder.open(path).forget("c", "e")


def replace_two(path: Path) -> None:
    append(MemoryFolder.open(path), ["c", "e"], replaced=["c", "e"])


def merge_two(path: Path) -> None:
    MemoryFolder.merge([path, path.with_name("other")], path.with_name("merged"))


def check_recovery(path: Path, before: list[str], after: list[str]) -> str:
    """One of both states is there, and another writer can go on and leaves nothing behind."""
    folder = MemoryFolder.open(path)
    folder.verify()
    names = [document.name for document in folder.documents]
    assert names in (before, after), names
    check_holds(folder, names)
    append(folder, ["h"])
    check_holds(MemoryFolder.open(path), [*names, "h"])
    files = {one.name for one in path.iterdir()}
    named = {segment.path.name for segment in folder.contents.segments}
    assert files == {"lock", "manifest.json", *named}, files
    return "new" if names == after else "old"


def kill_at_every_step(
    folder: Path, work: Callable[[Path], None], after: list[str], is_small: bool
) -> None:
    """Kill a writer before its first step, its second one and so on."""
    state.SMALL_SEGMENT = 10_000 if is_small else 1
    make_folder(folder / "origin", BEFORE[:3], BEFORE[3:])
    outcomes = []
    while not outcomes or outcomes[-1] != "done":
        path = folder / f"{len(outcomes)}"
        shutil.copytree(folder / "origin", path)

        def write(path: Path = path) -> None:
            kill_before(len(outcomes))
            work(path)

        _, status = os.waitpid(fork(write), 0)
        assert status in (0, signal.SIGKILL), status
        outcome = check_recovery(path, BEFORE, after)
        outcomes.append(outcome if status else "done")
        shutil.rmtree(path)
    assert outcomes == sorted(outcomes, key=["old", "new", "done"].index), outcomes
    assert outcomes.count("old") >= 7, outcomes
    assert outcomes.count("new") >= 2, outcomes
    print(work.__name__, len(outcomes), "steps")


def kill_merges(folder: Path) -> None:
    make_folder(folder / "one", ["a", "b"])
    make_folder(folder / "other", ["c", "a"])
    step, status = 0, 1
    while status:

        def write(step: int = step) -> None:
            kill_before(step)
            merge_two(folder / "one")

        _, status = os.waitpid(fork(write), 0)
        assert status in (0, signal.SIGKILL), status
        # Whatever is left of it, the next one succeeds.
        merged = folder / "merged"
        if not merged.exists():
            merge_two(folder / "one")
        check_holds(MemoryFolder.open(merged), ["a", "b", "c"])
        assert {one.name for one in folder.iterdir()} == {"one", "other", "merged"}
        shutil.rmtree(merged)
        step += 1
    assert step > 7
    print("merge", step, "steps")


def kill_creations(folder: Path) -> None:
    step, status = 0, 1
    while status:

        def write(step: int = step) -> None:
            kill_before(step)
            MemoryFolder.create(folder / "new", describe())

        _, status = os.waitpid(fork(write), 0)
        try:
            made = MemoryFolder.open(folder / "new")
        except MemoryFolderError:
            made = MemoryFolder.create(folder / "new", describe())
        append(made, ["a"])
        check_holds(made, ["a"])
        shutil.rmtree(folder / "new")
        step += 1
    assert step > 5
    print("create", step, "steps")


def kill_at_any_moment(folder: Path, num_kills: int) -> None:
    """Kill a writer that goes on and on, each time where the last one left off."""
    make_folder(folder / "long")
    choose = random.Random(0)
    most = 0

    def write() -> None:
        written = MemoryFolder.open(folder / "long")
        number = len(written.documents)
        while True:
            append(written, [f"document {number}"])
            number += 1

    for _ in range(num_kills):
        child = fork(write)
        time.sleep(choose.uniform(0.01, 0.1))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        opened = MemoryFolder.open(folder / "long")
        opened.verify()
        assert len(opened.documents) >= most
        most = len(opened.documents)
    check_holds(opened, [f"document {number}" for number in range(most)])
    print("killed", num_kills, "writers after", most, "documents")


def read_beside_a_writer(folder: Path, num_rounds: int) -> None:
    """Two readers see whole states only; a second writer is refused."""
    state.SMALL_SEGMENT = 50
    path = folder / "shared"
    written = make_folder(path, BEFORE)
    queries = torch.zeros(1, 2, 3, 13)

    def read() -> None:
        before, changes = MemoryFolder.open(path), 0
        memory = before.open_layer(3)
        while (path / "running").exists():
            opened = MemoryFolder.open(path)
            check_holds(opened, [document.name for document in opened.documents])
            if opened.documents != before.documents:
                changes += 1
                (folder / f"saw-{os.getpid()}").touch()
            memory.retrieve(queries, 3)
            before.refresh()
        check_holds(before, [document.name for document in before.documents])
        assert changes

    def write_too() -> None:
        with pytest.raises(MemoryFolderError, match=f"written by process {os.getppid()} on "):
            append(MemoryFolder.open(path), ["z"])

    (path / "running").touch()
    readers = [fork(read), fork(read)]
    names = list(BEFORE)
    with written.lock():
        assert os.waitpid(fork(write_too), 0)[1] == 0
        number, end_s = 0, time.monotonic() + 60
        while number < num_rounds or len(list(folder.glob("saw-*"))) < 2:
            assert time.monotonic() < end_s, "a reader saw nothing of a minute of writing"
            append(written, [f"document {number}"])
            names.append(f"document {number}")
            written.forget(names.pop(0))
            number += 1
            time.sleep(0.01)
    (path / "running").unlink()
    for reader in readers:
        assert os.waitpid(reader, 0)[1] == 0
    check_holds(MemoryFolder.open(path), names)
    print("two readers beside", number, "rounds of a writer")


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    kill_at_every_step(folder / "append", append_two, [*BEFORE, "f", "g"], True)
    kill_at_every_step(folder / "forget", forget_two, ["a", "b", "d"], False)
    kill_at_every_step(folder / "replace", replace_two, ["a", "b", "d", "c", "e"], False)
    for task in (kill_merges, kill_creations):
        (folder / task.__name__).mkdir()
        task(folder / task.__name__)
    kill_at_any_moment(folder, 4)
    read_beside_a_writer(folder, 5)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
