"""Which documents are read: files, folders, patterns and standard input, by name."""

import io
import os

import pytest

from memorizing.memory.disk import MemoryFolder
from tests.cli.test_read import MEMORY_WORDS, list_names


def test_files_are_named_as_given_and_read_once(run, llama, tree, tmp_path, monkeypatch):
    monkeypatch.chdir(tree)
    memory = tmp_path / "tree.memory"
    given = ("./b.py", "a/first.md", "*.py", "**/*.md", tree / "b.py", "node_modules")
    assert run("read", llama, *given, "--memory", memory, *MEMORY_WORDS).status == 0
    assert list_names(memory) == ["b.py", "a/first.md", "x.js"]


def test_a_prefix_tells_two_folders_apart(run, llama, tmp_path):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "README.md").write_text(f"what {name} is about")
    memory = tmp_path / "both.memory"
    words = ("--memory", memory, *MEMORY_WORDS)
    outcome = run("read", llama, tmp_path / "one", tmp_path / "two", *words)
    assert outcome.status == 2
    assert "'README.md'" in outcome.err
    assert not memory.exists()
    for name in ("one", "two"):
        given = (tmp_path / name, "--prefix", f"{name}/", *words)
        assert run("read", llama, *given).status == 0
    assert list_names(memory) == ["one/README.md", "two/README.md"]


def give_stdin(monkeypatch: pytest.MonkeyPatch, content: bytes) -> None:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(content)))


def test_standard_input_is_a_document_with_a_name(run, llama, tree, tmp_path, monkeypatch):
    memory = tmp_path / "in.memory"
    words = ("--memory", memory, *MEMORY_WORDS)
    give_stdin(monkeypatch, b"what a pipe says")
    outcome = run("read", llama, "-", *words)
    assert outcome.status == 2
    assert "--name" in outcome.err
    outcome = run("read", llama, tree / "b.py", "--name", "pipe", *words)
    assert outcome.status == 2
    assert "which is not read" in outcome.err
    assert run("read", llama, "-", "--name", "pipe", "--keep-text", *words).status == 0
    assert MemoryFolder.open(memory).contents.read_text("pipe") == "what a pipe says"
    give_stdin(monkeypatch, b"\xff")
    outcome = run("read", llama, "-", "--name", "other", *words)
    assert outcome.status == 2
    assert "not UTF-8" in outcome.err


def test_what_cannot_be_read_is_left_out(run, llama, tree, tmp_path):
    (tree / "gone.txt").symlink_to(tree / "nowhere.txt")
    os.mkfifo(tree / "pipe.txt")
    outcome = run("read", llama, tree, "--memory", tmp_path / "m", *MEMORY_WORDS)
    assert outcome.status == 0
    assert "1 no plain file" in outcome.err
    assert "1 cannot be read (No such file or directory)" in outcome.err


def test_a_file_without_permission_is_left_out(run, llama, tree, tmp_path, monkeypatch):
    system_open = os.open

    def refuse(path, *words, **named):
        if str(path).endswith("b.py"):
            raise PermissionError(13, "Permission denied", str(path))
        return system_open(path, *words, **named)

    monkeypatch.setattr("os.open", refuse)
    outcome = run("read", llama, tree, "--memory", tmp_path / "m", *MEMORY_WORDS)
    assert outcome.status == 0
    assert "1 cannot be read (Permission denied)" in outcome.err
    assert "b.py" not in list_names(tmp_path / "m")


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["a/picture.png", "a/nothing.txt"], "left out were 1 binary, 1 empty"),
        (["none.txt"], "does not exist"),
        (["*.rs"], "matches no file"),
        ([".git/hooks"], "does not exist"),
    ],
)
def test_nothing_to_read_is_one_line_and_makes_no_memory(
    run, llama, tree, tmp_path, monkeypatch, given, said
):
    monkeypatch.chdir(tree)
    outcome = run("read", llama, *given, "--memory", tmp_path / "m", *MEMORY_WORDS)
    assert outcome.status == 2
    assert said in outcome.err
    assert len(outcome.err.splitlines()) == 1
    assert not (tmp_path / "m").exists()
