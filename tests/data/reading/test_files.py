"""Files are found by folder, name and pattern; what is no text that can be read is named."""

import os
import resource
import socket
from pathlib import Path, PurePosixPath

import pytest

from memorizing.data.reading.files import (
    Rules,
    expand_pattern,
    find_files,
    find_text_files,
    list_files,
    load_text,
    read_bytes,
)
from memorizing.data.text import ReadLog
from memorizing.errors import CorpusError, ResourceError


def make_odd_files(folder: Path, suffix: str = ".txt") -> list[str]:
    """What is no plain file, under names with the suffix; none of it may be waited for."""
    os.mkfifo(folder / f"pipe{suffix}")
    os.symlink("/dev/zero", folder / f"zeros{suffix}")
    os.symlink(f"loop{suffix}", folder / f"loop{suffix}")
    os.symlink("gone", folder / f"broken{suffix}")
    (folder / f"folder{suffix}").mkdir()
    with socket.socket(socket.AF_UNIX) as server:
        here = os.open(folder, os.O_RDONLY)
        server.bind(f"/proc/self/fd/{here}/socket{suffix}")  # names of sockets are short
        os.close(here)
    return [f"{name}{suffix}" for name in ("broken", "loop", "pipe", "socket", "zeros")]


def test_hidden_files_and_byte_code_are_not_found(tmp_path):
    for name in (".git/config", "__pycache__/a.pyc", "src/a.py", ".hidden", "left/b.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x")
    log = ReadLog()
    found = find_files(tmp_path, log, explain=lambda path: "x" if path.name == "left" else "")
    assert found == [PurePosixPath("src/a.py")]
    assert not log.items


def test_what_is_no_plain_file_is_named_and_not_waited_for(tmp_path):
    odd = make_odd_files(tmp_path)
    (tmp_path / "good.txt").write_text("good")
    for find in (
        lambda log: list_files(str(tmp_path), log),
        lambda log: list_files(f"{tmp_path}/*.txt", log),
        lambda log: find_text_files([str(tmp_path)], Rules(), log),
    ):
        log = ReadLog()
        assert list(find(log)) == ["good.txt"]
        assert [Path(name).name for name, _ in log.items] == odd
    for name in odd:
        log = ReadLog()
        assert read_bytes(tmp_path / name, name, log) is None
        assert load_text(tmp_path / name, name, log) is None
        assert len(log.items) == 2


def test_a_pattern_ends_where_links_lead_round_in_a_circle(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "t.txt").write_text("t")
    os.symlink("..", tmp_path / "a" / "up")
    os.symlink(".", tmp_path / "self")
    for pattern in ("**/*.txt", "**", "a/***"):
        log = ReadLog()
        assert {path.name for path in list_files(f"{tmp_path}/{pattern}", log).values()} == {
            "t.txt"
        }, pattern
    assert expand_pattern(tmp_path / "**" / "*.txt")[1] == [tmp_path / "a" / "t.txt"]


def test_names_that_are_not_utf8_are_names_that_can_be_written(tmp_path):
    for raw in (b"caf\xe9.txt", b"\xff\xfe", b"new\nline"):
        with open(os.path.join(os.fsencode(tmp_path), raw), "w") as file:
            file.write("text")
    log = ReadLog()
    found = find_text_files([str(tmp_path)], Rules(), log)
    assert sorted(found) == ["\\udcff\\udcfe", "caf\\udce9.txt", "new\nline"]
    assert {load_text(path, name, log) for name, path in found.items()} == {"text"}
    log.skip("caf\udce9", "binary")
    assert "\n".join(log.lines).encode() == b"caf\\udce9: binary"


@pytest.mark.parametrize("where", ["x" * 4099, "~surely-nobody/a", "a\0b"])
def test_a_path_that_the_system_does_not_take_is_refused(where, tmp_path):
    for find in (
        lambda: list_files(where, ReadLog()),
        lambda: find_text_files([where], Rules(), ReadLog()),
    ):
        with pytest.raises(CorpusError, match="is none|does not exist"):
            find()


def test_too_many_open_files_end_the_reading_instead_of_leaving_out_the_rest(tmp_path):
    (tmp_path / "a.txt").write_text("a")
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (0, before[1]))
        with pytest.raises(ResourceError, match="too many files are open .*ulimit -n"):
            read_bytes(tmp_path / "a.txt", "a.txt", ReadLog())
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
