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


def test_a_model_that_is_not_there_is_one_line(run, tmp_path, tree, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))

    def fail(self, name, **words):
        raise ConnectionError("no route to the hub")

    monkeypatch.setattr("huggingface_hub.HfApi.model_info", fail)
    (tmp_path / "file.gguf").write_text("x")
    (tmp_path / "empty").mkdir()
    for model, said in (
        (tmp_path / "none", "there is no folder"),
        (tmp_path / "empty", "has no config.json"),
        (tmp_path / "file.gguf", "is a file"),
        ("nobody/such-a-model", "no route to the hub"),
        ("not a name", "is no name on the hub"),
    ):
        outcome = run("read", model, tree, "--memory", tmp_path / "m", *FP32)
        assert outcome.status == 2
        assert said in outcome.err
        assert len(outcome.err.splitlines()) == 1
        assert run("generate", model, "--prompt", "x", *FP32).status == 2
    assert not (tmp_path / "m").exists()


def test_a_model_in_a_folder_that_is_no_utf8_is_one_line_that_says_what_helps(
    run, llama, notes, tmp_path
):
    # Python gives such bytes of a command line as lone surrogates.
    folder = shutil.copytree(llama, tmp_path / "caf\udce9" / "llama")
    for words in (
        ("generate", folder, "--prompt", "x"),
        ("read", folder, notes, "--memory", tmp_path / "m"),
        ("finetune", folder, "--corpus", f"files:{notes}", "--out", tmp_path / "run"),
    ):
        outcome = run(*words, *FP32)
        assert (outcome.status, outcome.out) == (2, "")
        *_, line = outcome.err.splitlines()
        assert "is not UTF-8, and a model cannot be loaded from there; rename the folder" in line
        assert "another copy" not in outcome.err
    assert not (tmp_path / "m").exists()
    assert not (tmp_path / "run").exists()


def test_a_model_in_the_cache_of_the_hub_needs_no_network(run, llama, tmp_path, monkeypatch):
    cache = tmp_path / "hub" / "models--someone--tiny"
    (cache / "refs").mkdir(parents=True)
    (cache / "refs" / "main").write_text("0123abcd")
    shutil.copytree(llama, cache / "snapshots" / "0123abcd")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))

    def refuse(*words, **named):
        raise AssertionError("the hub was asked")

    monkeypatch.setattr("huggingface_hub.HfApi.model_info", refuse)
    monkeypatch.setattr("socket.socket.connect", refuse)
    words = ("--prompt", "alpha", "--max-new-tokens", "3", *FP32)
    outcome = run("generate", "someone/tiny", *words)
    assert outcome.status == 0, outcome.err
    assert outcome.out == run("generate", llama, *words).out


def test_weights_that_are_missing_are_not_drawn_at_random(run, llama, tmp_path):
    from safetensors.torch import load_file, save_file

    folder = Path(shutil.copytree(llama, tmp_path / "partial"))
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    outcome = run("generate", folder, "--prompt", "x", *FP32)
    assert outcome.status == 2
    assert "model.layers.1.mlp.up_proj.weight" in outcome.err
    (folder / "model.safetensors").write_bytes(b"cut off")
    outcome = run("generate", folder, "--prompt", "x", *FP32)
    assert outcome.status == 2
    assert "and its files have 7 bytes; use another copy of the model" in outcome.err


def test_a_model_without_its_tokenizer_is_refused(run, llama, tmp_path):
    folder = Path(shutil.copytree(llama, tmp_path / "dumb"))
    for path in folder.glob("tokenizer*"):
        path.unlink()
    outcome = run("generate", folder, "--prompt", "x", *FP32)
    assert outcome.status == 2
    assert "the tokenizer in" in outcome.err


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
