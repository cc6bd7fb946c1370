"""One writer at a time."""

from __future__ import annotations

import os
import re
import signal
import socket
import threading
from pathlib import Path

import pytest

from memorizing.errors import MemoryFolderError, RunFolderError
from memorizing.storage.locks import hold_lock, is_locked


def is_refused(folder: Path) -> bool:
    try:
        with hold_lock(folder, RunFolderError):
            return False
    except RunFolderError:
        return True


def ask_child(folder: Path) -> bool:
    child = os.fork()
    if not child:
        os._exit(is_refused(folder))
    return bool(os.waitpid(child, 0)[1])


def test_a_second_writer_is_refused_and_told_who_holds_the_lock_since_when(tmp_path: Path) -> None:
    owner = f"process {os.getpid()} on {re.escape(socket.gethostname())} since 20"
    with hold_lock(tmp_path, RunFolderError):
        with (
            pytest.raises(MemoryFolderError, match=f"written by {owner}.*: ask it"),
            hold_lock(tmp_path, MemoryFolderError, remedy="ask it"),
        ):
            pass
        refused: list[bool] = []
        thread = threading.Thread(target=lambda: refused.append(is_refused(tmp_path)))
        thread.start()
        thread.join()
        assert refused == [True]
        assert ask_child(tmp_path)
        assert is_locked(tmp_path)
    assert not is_locked(tmp_path)
    assert not ask_child(tmp_path)
    assert not is_refused(tmp_path)


def test_a_child_does_not_keep_the_lock_of_its_parent_nor_end_it(tmp_path: Path) -> None:
    lasting, ready = os.pipe(), os.pipe()
    child = 0
    try:
        with hold_lock(tmp_path, RunFolderError):
            child = os.fork()
            if not child:
                os.write(ready[1], b"x")
                os.read(lasting[0], 1)
            else:
                os.read(ready[0], 1)
                noted = (tmp_path / "lock").read_text()
        if not child:
            os._exit(0)
        assert str(os.getpid()) in noted
        # The child lives, and holds nothing.
        assert not is_refused(tmp_path)
    finally:
        os.write(lasting[1], b"x")
        os.waitpid(child, 0)


def test_a_child_that_leaves_the_block_does_not_free_the_lock(tmp_path: Path) -> None:
    with hold_lock(tmp_path, RunFolderError):
        pass
    child = 1
    with hold_lock(tmp_path, RunFolderError):
        child = os.fork()
        if child:
            os.waitpid(child, 0)
            assert ask_child(tmp_path)
            assert f"process {os.getpid()} " in (tmp_path / "lock").read_text()
    if not child:
        os._exit(0)


def test_a_lock_is_free_when_its_process_was_killed(tmp_path: Path) -> None:
    ready = os.pipe()
    child = os.fork()
    if not child:
        try:
            with hold_lock(tmp_path, RunFolderError):
                os.write(ready[1], b"x")
                signal.pause()
        finally:
            os._exit(1)
    os.read(ready[0], 1)
    assert is_locked(tmp_path)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    assert not is_refused(tmp_path)


def test_asking_for_a_lock_that_never_was_makes_nothing(tmp_path: Path) -> None:
    assert not is_locked(tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_lock_that_is_a_link_or_cannot_be_written_is_no_lock(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("mine")
    (tmp_path / "lock").symlink_to("mine")
    with pytest.raises(OSError, match="lock"), hold_lock(tmp_path, RunFolderError):
        pass
    assert (tmp_path / "mine").read_text() == "mine"
