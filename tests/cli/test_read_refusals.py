"""`memorizing read` and its refusals, with the tiny model of conftest.py."""

import shutil
from pathlib import Path

from memorizing.memory.disk import MemoryFolder
from tests.cli.test_read import FP32


def make_damaged_copy(memory: Path, tmp_path: Path) -> Path:
    folder = Path(shutil.copytree(memory, tmp_path / "damaged.memory"))
    path = next(folder.glob("segment-*.safetensors"))
    content = bytearray(path.read_bytes())
    content[len(content) // 3] ^= 1
    path.write_bytes(content)
    return folder


def test_the_memory_of_another_model_is_refused(run, memory, other_llama, notes):
    for words in (
        ("read", other_llama, notes, "--memory", memory),
        ("generate", other_llama, "--prompt", "alpha", "--memory", memory),
    ):
        outcome = run(*words, *FP32)
        assert outcome.status == 2
        assert "use the model that wrote it" in outcome.err
        assert outcome.out == ""


def test_a_damaged_memory_is_refused_before_it_is_used(run, memory, llama, notes, tmp_path):
    damaged = make_damaged_copy(memory, tmp_path)
    words = ("--prompt", "a prompt that is longer than the window", "--memory", damaged)
    outcome = run("generate", llama, *words, *FP32)
    assert outcome.status == 2
    assert "was altered" in outcome.err
    assert outcome.out.strip() == ""
    (damaged / "manifest.json").write_text("{}")
    for verb in (("generate", llama, "--prompt", "x"), ("read", llama, notes)):
        outcome = run(*verb, "--memory", damaged)
        assert outcome.status == 2
        assert "is refused" in outcome.err
        assert len(outcome.err.splitlines()) == 1


def test_a_place_that_is_no_memory_is_refused(run, llama, tree, tmp_path):
    for place, said in ((tree / "b.py", "is a file"), (tree, "holds no memory")):
        outcome = run("read", llama, tree, "--memory", place, *FP32)
        assert outcome.status == 2
        assert said in outcome.err
    outcome = run("generate", llama, "--memory", tmp_path / "none", "--prompt", "x")
    assert outcome.status == 2
    assert "holds no memory" in outcome.err


def test_a_memory_that_is_being_written_is_not_read_into(run, memory, llama, notes, tmp_path):
    folder = Path(shutil.copytree(memory, tmp_path / "busy.memory"))
    (tmp_path / "new.txt").write_text("something new to read")
    with MemoryFolder.open(folder).lock():
        outcome = run("read", llama, tmp_path / "new.txt", "--memory", folder, *FP32)
        words = ("--memory", folder, "--prompt", "alpha", "--max-new-tokens", "1")
        assert run("generate", llama, *words, *FP32).status == 0
    assert outcome.status == 2
    assert "is being written by process" in outcome.err


def test_a_cluster_needs_workers(run, llama, tree, tmp_path):
    words = ("--memory", tmp_path / "new", "--ray", "head:6379")
    outcome = run("read", llama, tree, *words, *FP32)
    assert outcome.status == 2
    assert "--ray head:6379 is where workers run, and there are none; add --workers" in outcome.err
