"""Models of `transformers` on the command line: found, or refused in one line."""

import shutil
from pathlib import Path

from tests.cli.test_read import FP32


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
