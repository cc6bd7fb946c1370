"""Files that are whole or not there, and what is read of files that somebody else wrote."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import pytest
from safetensors import SafetensorError

from memorizing.errors import CheckpointError, ResourceError
from memorizing.storage.files import (
    encode_json,
    explain_failures,
    is_leftover,
    name_temporary,
    read_json,
    remove_leftovers,
    write_bytes,
    write_json,
    write_output,
)

DEEP = b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}"


def list_names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def leave_behind(folder: Path, ending: str = "part", content: bytes | None = b"half") -> str:
    """Let another process end without removing its temporary file or folder."""
    code = (
        "import os, sys, pathlib\n"
        "from memorizing.storage.files import name_temporary\n"
        f"with name_temporary(pathlib.Path({str(folder)!r}), {ending!r}) as path:\n"
        f"    path.write_bytes({content!r}) if {content is not None} else path.mkdir()\n"
        "    print(path.name, flush=True)\n"
        "    os._exit(0)\n"
    )
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout.strip()


def test_pieces_are_written_one_after_the_other_and_hashed(tmp_path: Path) -> None:
    path = tmp_path / "new" / "deep" / "file"
    found = write_bytes(path, iter([b"ab", memoryview(b"c"), b""]))
    assert path.read_bytes() == b"abc"
    assert found == hashlib.sha256(b"abc").hexdigest()
    assert list_names(path.parent) == ["file"]


def test_a_file_that_cannot_be_written_leaves_nothing_behind(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(ResourceError, match="choose another folder"):
        write_bytes(tmp_path / "file" / "inner.bin", b"x")
    (tmp_path / "taken").mkdir()
    with pytest.raises(ResourceError):
        write_bytes(tmp_path / "taken", b"x")
    assert list_names(tmp_path) == ["file", "taken"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_an_error_between_two_pieces_leaves_the_old_file(
    error: type[BaseException], tmp_path: Path
) -> None:
    def iterate():
        yield b"new"
        raise error

    write_bytes(tmp_path / "file", b"old")
    with pytest.raises(error):
        write_bytes(tmp_path / "file", iterate())
    assert list_names(tmp_path) == ["file"]
    assert (tmp_path / "file").read_bytes() == b"old"


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "x: no space left; what was saved"),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), "no space left in the quota"),
        (OSError(errno.EMFILE, "Too many open files"), "too many files are open .*ulimit -n"),
        (PermissionError(errno.EACCES, "Permission denied"), "Permission denied"),
        (SafetensorError("I/O error: No space left on device (os error 28)"), "no space left;"),
    ],
)
def test_what_the_system_refuses_is_said_in_our_words(error: Exception, words: str) -> None:
    with pytest.raises(ResourceError, match=words) as caught, explain_failures("x", "do y"):
        raise error
    assert str(caught.value).endswith(": do y")


def test_errors_that_are_no_failure_of_the_system_pass() -> None:
    for error in (SafetensorError("header too large"), ValueError("x"), ResourceError("ours")):
        with pytest.raises(type(error)) as caught, explain_failures("x"):
            raise error
        assert caught.value is error


def test_a_device_and_a_pipe_are_written_to_and_stay(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    read: list[bytes] = []
    reader = threading.Thread(target=lambda: read.append((tmp_path / "pipe").read_bytes()))
    reader.start()
    write_output(tmp_path / "pipe", b"x" * 200_000)
    reader.join()
    assert read == [b"x" * 200_000]
    assert (tmp_path / "pipe").is_fifo()
    (tmp_path / "link").symlink_to("/dev/null")
    for path in (tmp_path / "link", Path("/dev/null")):
        write_output(path, b"gone")
        assert Path("/dev/null").is_char_device()
    with pytest.raises(ResourceError, match="no space left"):
        write_output(Path("/dev/full"), b"x")


def test_a_descriptor_of_a_file_is_added_to(tmp_path: Path) -> None:
    with (tmp_path / "printed").open("wb", buffering=0) as file:
        file.write(b"printed\n")
        write_output(Path(f"/dev/fd/{file.fileno()}"), b"{}\n")
        write_output(Path(f"/proc/self/fd/{file.fileno()}"), b"[]\n")
    assert (tmp_path / "printed").read_bytes() == b"printed\n{}\n[]\n"


def test_an_output_follows_links_and_refuses_folders(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "link").symlink_to("there/file")
    (tmp_path / "second").symlink_to("link")
    for content in (b"new", b"newer"):
        write_output(tmp_path / "second", content)
        assert (tmp_path / "there" / "file").read_bytes() == content
    assert (tmp_path / "link").is_symlink()
    (tmp_path / "folder").symlink_to("there")
    (tmp_path / "round").symlink_to("round")
    for name in ("there", "folder", "round"):
        with pytest.raises(ResourceError, match=name):
            write_output(tmp_path / name, b"x")
    assert list_names(tmp_path) == ["folder", "link", "round", "second", "there"]


@pytest.mark.skipif(not os.access("/dev/shm", os.W_OK), reason="no plain files below /dev here")
def test_a_plain_file_below_dev_is_replaced_as_any_other() -> None:
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        for content in (b"new", b"newer"):
            write_output(Path(folder) / "deep" / "file", content)
            assert (Path(folder) / "deep" / "file").read_bytes() == content


def test_json_has_null_for_what_is_not_finite_and_keeps_names_that_are_not_utf8(
    tmp_path: Path,
) -> None:
    name = os.fsdecode(b"a\xff\xc3\xa4")
    values = {name: [float("nan"), (1.5, -float("inf"))], "é": "日本"}
    write_json(tmp_path / "x", values)
    read = read_json(tmp_path / "x", CheckpointError, "")
    assert read == {name: [None, [1.5, None]], "é": "日本"}
    assert "日本".encode() in (tmp_path / "x").read_bytes()
    assert encode_json(read) == (tmp_path / "x").read_bytes()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "is not JSON"),
        (b'{"a": ', "is not JSON"),
        (b"[1]", "does not hold a JSON object"),
        (b"\xff\xfe{\x00}\x00", "is not JSON in UTF-8: 'utf-8' codec can't decode"),
        (b'{"a": "\xe9"}', "is not JSON in UTF-8: 'utf-8' codec can't decode"),
        (DEEP, "recursion"),
        (b'{"a": ' + b"1" * 5000 + b"}", "is not JSON"),
    ],
    ids=range(7),
)
def test_json_that_is_damaged_is_an_error_of_ours(
    content: bytes, words: str, tmp_path: Path
) -> None:
    (tmp_path / "x").write_bytes(content)
    with pytest.raises(CheckpointError, match=f"{words}.*; take another") as caught:
        read_json(tmp_path / "x", CheckpointError, "take another")
    assert len(str(caught.value)) < 500


def test_json_may_begin_with_a_byte_order_mark(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"\xef\xbb\xbf" + json.dumps({"a": 1}).encode())
    assert read_json(tmp_path / "x", CheckpointError, "") == {"a": 1}


def test_json_is_read_from_plain_files_only(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    (tmp_path / "endless").symlink_to("/dev/zero")
    with (tmp_path / "huge").open("wb") as file:
        file.truncate(2**40)
    for name in ("pipe", "folder", "endless", "huge"):
        with pytest.raises(CheckpointError, match="cannot be read"):
            read_json(tmp_path / name, CheckpointError, "")
    with pytest.raises(CheckpointError, match="^nothing here$"):
        read_json(tmp_path / "missing", CheckpointError, "", missing="nothing here")


def test_leftovers_of_a_process_that_is_gone_are_removed_and_those_of_a_living_one_are_not(
    tmp_path: Path,
) -> None:
    (tmp_path / "mine").write_text("mine")
    (tmp_path / "target").mkdir()
    (tmp_path / ".memorizing-notes").write_text("mine")
    file, folder = leave_behind(tmp_path), leave_behind(tmp_path, content=None)
    (tmp_path / folder / "link").symlink_to(tmp_path / "target")
    (tmp_path / folder / "weights").write_text("half")
    assert is_leftover(file)
    with name_temporary(tmp_path) as path:
        path.write_text("half")
        child = os.fork()
        if not child:
            os._exit(is_leftover(path.name))
        assert os.waitpid(child, 0)[1] == 0
        remove_leftovers(tmp_path, is_locked=True)
        assert list_names(tmp_path) == sorted([".memorizing-notes", path.name, "mine", "target"])
    assert not path.exists()
    remove_leftovers(tmp_path / "missing")


def test_what_another_machine_left_is_removed_by_who_holds_the_lock(tmp_path: Path) -> None:
    name = ".memorizing-00000000-123-0123abcd.part"
    (tmp_path / name).write_text("half")
    remove_leftovers(tmp_path)
    assert list_names(tmp_path) == [name]
    remove_leftovers(tmp_path, is_locked=True)
    assert list_names(tmp_path) == []


def test_leftovers_of_earlier_releases_are_removed_by_who_holds_the_lock(tmp_path: Path) -> None:
    ours = [
        ".config.toml.0123456789ab4123456789abcdef0123",
        ".manifest.json.part",
        ".segment-000007.safetensors.part",
        ".partial-step-000100",
        ".partial-replaced-step-000100",
    ]
    others = [".partial-notes", ".notes.part", ".hidden", "step-000100", ".config.toml.0123456789"]
    for name in (*ours, *others):
        (tmp_path / name).mkdir()
    remove_leftovers(tmp_path)
    assert len(list_names(tmp_path)) == 10
    remove_leftovers(tmp_path, is_locked=True)
    assert list_names(tmp_path) == sorted(others)


def test_what_was_put_away_by_a_process_that_is_gone_gets_its_name_back(tmp_path: Path) -> None:
    leave_behind(tmp_path, "was-adapter", b"old")
    (tmp_path / ".partial-replaced-step-000100").mkdir()
    remove_leftovers(tmp_path, is_locked=True)
    assert list_names(tmp_path) == ["adapter", "step-000100"]
    leave_behind(tmp_path, "was-adapter", b"older")
    remove_leftovers(tmp_path)
    assert (tmp_path / "adapter").read_bytes() == b"old"
    assert list_names(tmp_path) == ["adapter", "step-000100"]
