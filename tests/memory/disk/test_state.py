"""Interrupted writers, and several processes at one folder."""

from __future__ import annotations

import errno
import os
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest
import torch

from memorizing.errors import MemoryFolderError, ResourceError
from memorizing.memory import MemoryFolder
from memorizing.memory.disk import segment, state
from tests.memory.disk.examples import (
    DIM,
    HEADS,
    append,
    check_holds,
    describe,
    list_files,
    make_folder,
)
from tests.memory.disk.killing import fork

ROOT = Path(__file__).parents[3]


def test_a_killed_writer_leaves_the_old_state_or_the_new_and_readers_see_no_other(
    tmp_path: Path,
) -> None:
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("killing.py")), str(tmp_path)],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'src'}", "OPENBLAS_NUM_THREADS": "1"},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 7, done.stdout


@pytest.mark.parametrize("call", ["fsync", "replace", "rename"])
@pytest.mark.parametrize("work", ["append", "forget", "merge", "create"])
def test_a_failure_of_the_system_leaves_the_old_state_or_the_new(
    call: str, work: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real: Callable[..., None] = getattr(os, call)
    num_failures = 0
    for step in range(20):
        folder = make_folder(tmp_path / f"{step}", ["a", "b", "c"])
        out = tmp_path / f"{step} out"
        left = [step]

        def fail(*arguments: object, left: list[int] = left) -> None:
            left[0] -= 1
            # To forget is tried again, in a way that needs less room.
            if left[0] == -1 or (left[0] < 0 and work == "forget"):
                raise OSError(errno.ENOSPC, "no space")
            real(*arguments)

        monkeypatch.setattr(os, call, fail)
        try:
            if work == "append":
                append(folder, ["d"])
            elif work == "forget":
                folder.forget("b")
            elif work == "merge":
                MemoryFolder.merge([folder.path], out)
            else:
                MemoryFolder.create(out, describe())
        except ResourceError as error:
            num_failures += 1
            assert "no space left" in str(error)  # noqa: PT017
        monkeypatch.undo()
        after = {"append": "abcd", "forget": "ac"}.get(work, "abc")
        opened = MemoryFolder.open(folder.path)
        opened.verify()
        check_holds(opened, "abc" if len(opened.documents) == 3 else after)
        # No large file is left behind, and nothing stands in the way of another attempt.
        assert len(list_files(folder.path)) == 3
        append(folder, ["e"])
        folder.forget("e")
        check_holds(folder, [document.name for document in opened.documents])
        if work in ("merge", "create") and not (out / "manifest.json").exists():
            assert list_files(tmp_path)[-1] in (f"{step}", f"{step} out")
            assert list_files(out) in ([], ["lock"]) if out.exists() else True
            MemoryFolder.create(out, describe())
        if left[0] >= 0:
            break
    expected = {
        "append": {"fsync": 4, "replace": 2},
        "forget": {"fsync": 4, "replace": 2},
        "merge": {"fsync": 5, "replace": 2, "rename": 1},
        "create": {"fsync": 3, "replace": 1},
    }
    assert num_failures == step == expected[work].get(call, 0)


def test_everything_that_a_manifest_names_is_on_the_disk_before_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_folder(tmp_path / "memory", ["a"])
    calls: list[str] = []
    sync, replace, unlink = os.fsync, os.replace, os.unlink

    def log_sync(descriptor: int) -> None:
        calls.append(f"sync {Path(os.readlink(f'/proc/self/fd/{descriptor}')).name}")
        sync(descriptor)

    def log_replace(source: Path, target: Path) -> None:
        calls.append(f"name {target.name}")
        replace(source, target)

    def log_unlink(path: Path, **options: int) -> None:
        if Path(path).exists():
            calls.append(f"remove {Path(path).name}")
        unlink(path, **options)

    monkeypatch.setattr(os, "fsync", log_sync)
    monkeypatch.setattr(os, "replace", log_replace)
    monkeypatch.setattr(os, "unlink", log_unlink)
    append(folder, ["b"])
    monkeypatch.undo()
    kinds = [re.sub(r"\.memorizing-.*\.part", "temporary", call) for call in calls]
    assert kinds == [
        "sync temporary",
        "name segment-000001.safetensors",
        "sync memory",
        "sync temporary",
        "name manifest.json",
        "sync memory",
        "remove segment-000000.safetensors",
    ]


def test_a_folder_that_cannot_be_written_can_be_read(tmp_path: Path) -> None:
    folder = make_folder(tmp_path, ["a"])
    # Root writes to what is only to be read, but to no folder.
    (tmp_path / "lock").unlink()
    (tmp_path / "lock").mkdir()
    check_holds(MemoryFolder.open(tmp_path), "a")
    with pytest.raises(ResourceError, match="cannot write the memory"):
        append(folder, ["b"])


def test_a_second_writer_is_refused_and_reading_goes_on(tmp_path: Path) -> None:
    first = make_folder(tmp_path, ["a"])
    second = MemoryFolder.open(tmp_path)
    with first.lock():
        append(first, ["b"])
        for write in (lambda: append(second, ["c"]), lambda: second.forget("a")):
            with pytest.raises(MemoryFolderError, match=f"written by process {os.getpid()} on "):
                write()
        check_holds(second, "a")
        second.refresh()
        check_holds(second, "ab")
        with first.lock():
            first.forget("a")
    # What was written since is seen before anything is written.
    append(second, ["c"])
    check_holds(second, "bc")
    append(first, ["d"])
    check_holds(MemoryFolder.open(tmp_path), "bcd")


def test_a_thread_beside_the_one_that_writes_is_refused(tmp_path: Path) -> None:
    folder = make_folder(tmp_path, ["a"])
    refused: list[MemoryFolderError] = []

    def write() -> None:
        try:
            append(folder, ["b"])
        except MemoryFolderError as error:
            refused.append(error)

    thread = threading.Thread(target=write)
    with folder.lock():
        thread.start()
        thread.join()
        folder.forget("a")
    assert f"written by process {os.getpid()} " in str(refused)
    check_holds(MemoryFolder.open(tmp_path), "")


def test_a_forked_child_of_a_writer_is_another_writer_and_keeps_no_lock(tmp_path: Path) -> None:
    folder = make_folder(tmp_path, ["a"])
    status = 0

    def is_refused() -> bool:
        try:
            append(folder, ["b"])
        except MemoryFolderError:
            return True
        return False

    with folder.lock():
        if child := fork(is_refused):
            status = os.waitpid(child, 0)[1]
            append(folder, ["c"])
    assert status == 0
    check_holds(MemoryFolder.open(tmp_path), "ac")
    # The lock is free while a child of its time lives.
    waiting, ending = os.pipe()
    with folder.lock():
        child = fork(lambda: os.read(waiting, 1) == b"x")
    assert not is_refused()
    os.write(ending, b"x")
    assert os.waitpid(child, 0)[1] == 0
    check_holds(MemoryFolder.open(tmp_path), "acb")


@pytest.mark.parametrize("most", [0, 900])
def test_what_is_forgotten_frees_a_disk_that_is_full(
    most: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a disk that has room for manifests, and for segments of so many bytes at once."""
    monkeypatch.setattr(state, "SMALL_SEGMENT", 1)
    folder = make_folder(tmp_path, ["a", "b", "c", "d", "e", "f"], ["h", "i"], ["g"])
    saved = tmp_path / "index" / "segment-000000" / "7-name"
    saved.mkdir(parents=True)
    (saved / "vectors").write_text("made from the entries")
    real = segment.write_bytes

    def write(path: Path, content: Iterable[bytes]) -> str:
        pieces = [bytes(piece) for piece in content]
        used = sum(one.stat().st_size for one in tmp_path.glob("segment-*"))
        if used + sum(map(len, pieces)) > room:
            raise ResourceError("no space left")
        return real(path, pieces)

    monkeypatch.setattr(segment, "write_bytes", write)
    room = sum(one.stat().st_size for one in tmp_path.glob("segment-*")) + most
    # Nothing is kept of the second segment; of the first, only what is large.
    names = ["h", "i", "a"]
    try:
        folder.forget(*names)
        left = "bcdefg"
    except ResourceError as error:
        assert "no space left" in str(error)  # noqa: PT017
        left = "abcdefg"
    assert ("a" in left) == (most == 0)
    check_holds(MemoryFolder.open(tmp_path), left)
    assert not saved.exists()


def test_an_open_memory_stays_readable_when_its_files_are_gone(tmp_path: Path) -> None:
    folder = make_folder(tmp_path, ["a", "b"])
    reader = MemoryFolder.open(tmp_path)
    memory = reader.open_layer(3)
    queries = torch.randn(1, HEADS, 5, DIM, generator=torch.Generator().manual_seed(0))
    folder.forget("a")
    (found,) = memory.retrieve(queries, 7)
    assert int(found.neighbors.slots.max()) >= folder.num_entries
    check_holds(reader, "ab")
    reader.refresh()
    check_holds(reader, "b")


@pytest.mark.parametrize("who", ["a writer", "a reader"])
def test_leftovers_are_removed_by_whoever_opens_next_and_other_files_are_not(
    who: str, tmp_path: Path
) -> None:
    folder = make_folder(tmp_path, ["a"])
    for name in (
        ".segment-000007.safetensors.part",
        ".manifest.json.part",
        ".memorizing-01234567-1-89abcdef.part",
    ):
        (tmp_path / name).write_bytes(b"half")
    (tmp_path / "segment-000008.safetensors").write_bytes(b"whole")
    (tmp_path / "index" / "segment-000008" / "3-name").mkdir(parents=True)
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "mine").write_text("mine")
    (tmp_path / "segment-000009.safetensors").symlink_to("outside")
    for name in ("notes.txt", "segment-1.safetensors", ".segment-x.part", "index/mine"):
        (tmp_path / name).write_text("mine")
    with folder.lock():
        (tmp_path / "segment-000010.safetensors").write_bytes(b"being written")
        # A reader beside a writer removes nothing.
        MemoryFolder.open(tmp_path)
        assert (tmp_path / "segment-000010.safetensors").exists()
    if who == "a writer":
        with folder.lock():
            pass
    else:
        MemoryFolder.open(tmp_path)
    assert list_files(tmp_path) == [
        ".segment-x.part",
        "index",
        "lock",
        "manifest.json",
        "notes.txt",
        "outside",
        "segment-000000.safetensors",
        "segment-1.safetensors",
    ]
    assert list_files(tmp_path / "index") == ["mine"]
    assert list_files(tmp_path / "outside") == ["mine"]


def test_a_reader_whose_manifest_was_replaced_meanwhile_reads_the_new_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_folder(tmp_path, ["a", "b"])
    stale, real = [folder.contents.manifest], state.read_manifest
    folder.forget("a")
    monkeypatch.setattr(state, "read_manifest", lambda path: stale.pop() if stale else real(path))
    check_holds(MemoryFolder.open(tmp_path), "b")
    assert not stale
