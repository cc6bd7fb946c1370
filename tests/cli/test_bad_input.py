"""Bad input gives one clear line, status 2, no traceback, and nothing half-written."""

import json
import shutil

import pytest

from memorizing.errors import ConfigError
from memorizing.run_report import report_run


@pytest.fixture
def copied(trained, tmp_path):
    """A run that may be damaged."""
    return shutil.copytree(trained, tmp_path / "copied")


@pytest.mark.parametrize(
    ("recipe", "setting", "expected"),
    [
        ("tniy", "model.num_layers=2", "unknown recipe 'tniy'; did you mean 'tiny'?"),
        ("tiny", "model.num_layer=2", "unknown key 'model.num_layer'; did you mean"),
        ("tiny", "num_layers=2", "did you mean 'model.num_layers'?"),
        ("tiny", "model.num_layers", "has no '='; write it as table.key=value"),
        ("tiny", "model.num_layers=two", "model.num_layers is 'two'; allowed: a whole number"),
        ("tiny", "model.memory_layers=2", "layers from 0 to 1, counted from 0"),
        ("tiny", "model.capacity=1", "0 (no memory), or at least num_neighbors = 8"),
        ("tiny", "model.capacity=7", "0 (no memory), or at least num_neighbors = 8"),
        ("tiny", "model.combine=gat", "'gate' or 'joint'"),
        ("tiny", "data.corpus=stdlib", "has no kind; write kind:where"),
        ("tiny", "data.corpus=pyhton:stdlib", "did you mean 'python'?"),
        ("tiny", "data.corpus=python:typr", "distribution 'typr' is not installed; did you mean"),
        ("tiny", "data.corpus=subpackages:typr", "package 'typr' is not installed"),
        ("tiny", "data.corpus=files:missing", "path 'missing' does not exist"),
        ("tiny", "data.validation=nowhere", "or none (data.validation=)"),
        ("tiny", "model.capacity=10000000000", "training needs about"),
        ("tiny", "training.rows=10000000", "training needs about"),
    ],
)
def test_training_refuses(recipe, setting, expected, refuse, tmp_path):
    line = refuse("train", recipe, "--run", tmp_path / "run", "--set", setting)
    assert expected in line
    assert not (tmp_path / "run").exists()


def test_too_little_memory_says_how_much_for_which_capacity_and_rows(refuse, tmp_path):
    words = ("--set", "model.capacity=10000000000")
    line = refuse("train", "tiny", "--run", tmp_path / "run", *words)
    for part in ("GiB are free", "memories of capacity 10,000,000,000 in 4 rows", "lower "):
        assert part in line


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, "holds no visible files"),
        ({"empty.txt": b""}, "no document with text"),
        ({"empty.txt": b"", "blank.txt": b" \n\t\n"}, "no document with text"),
    ],
)
def test_an_empty_corpus_is_refused_with_the_reason(files, expected, refuse, tmp_path):
    folder = tmp_path / "texts"
    folder.mkdir()
    for name, content in files.items():
        (folder / name).write_bytes(content)
    words = (
        "--set",
        f"data.corpus=files:{folder}",
        "--set",
        "data.validation=",
        "--set",
        "data.test=",
    )
    line = refuse("train", "tiny", "--run", tmp_path / "run", *words)
    assert expected in line
    assert not (tmp_path / "run").exists()


def test_a_document_without_text_and_bytes_that_are_not_utf8_are_said(
    run, texts, settings, tmp_path
):
    folder = shutil.copytree(texts, tmp_path / "texts")
    (folder / "blank.txt").write_bytes(b"\n")
    (folder / "latin1.txt").write_bytes("caf\xe9 ".encode("latin-1") * 97)
    words = (*settings, "--set", f"data.corpus=files:{folder}")
    outcome = run("train", "tiny", "--run", tmp_path / "run", *words)
    assert outcome.status == 0
    assert "1 files held bytes that are not UTF-8; they were replaced" in outcome.err
    assert "left out 1: blank.txt" in outcome.err


def test_a_run_folder_that_exists_is_left_alone(refuse, copied, settings):
    before = sorted(copied.rglob("*"))
    line = refuse("train", "tiny", "--run", copied, *settings)
    for remedy in ("--resume", "--overwrite", "another folder"):
        assert remedy in line
    assert sorted(copied.rglob("*")) == before


def test_a_run_folder_below_a_file_is_refused_before_the_work(run, texts, tmp_path, settings):
    file = next(texts.iterdir())
    outcome = run("train", "tiny", "--run", file / "deep" / "run", *settings)
    assert outcome.status == 2
    assert outcome.err == f"error: {file} is a file; give the run a folder\n"


def test_a_folder_that_is_not_a_run_is_not_overwritten(refuse, tmp_path, settings):
    (tmp_path / "mine.txt").write_text("mine")
    line = refuse("train", "tiny", "--run", tmp_path, "--overwrite", *settings)
    assert "exists and is not a run" in line
    assert (tmp_path / "mine.txt").read_text() == "mine"


def test_resuming_with_another_model_is_refused(refuse, copied, settings):
    words = (*settings, "--set", "model.ffn_dim=67")
    line = refuse("train", "tiny", "--run", copied, "--resume", *words)
    assert "model.ffn_dim was 64 and is 67" in line


def test_resuming_what_is_not_there_is_refused(refuse, tmp_path, settings):
    line = refuse("train", "tiny", "--run", tmp_path / "none", "--resume", *settings)
    assert "no run to resume" in line
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("verb", ["evaluate", "train"])
@pytest.mark.parametrize(
    ("name", "damage", "expected"),
    [
        ("model.safetensors", lambda content: content[:-13], "truncated or altered"),
        ("model.safetensors", lambda content: content[:-1] + b"\x7f", "altered"),
        ("model.safetensors", lambda _: b"", "truncated or altered"),
        (
            "config.json",
            lambda content: content.replace(b'"ffn_dim": 64', b'"ffn_dim": 67'),
            "altered",
        ),
    ],
)
def test_a_damaged_checkpoint_is_refused(name, damage, expected, verb, refuse, copied, settings):
    for path in copied.glob(f"checkpoints/step-*/{name}"):
        path.write_bytes(damage(path.read_bytes()))
    words = ("--run", copied, "--resume", *settings, "--set", "training.steps=5")
    line = refuse("evaluate", copied) if verb == "evaluate" else refuse("train", "tiny", *words)
    assert expected in line


@pytest.mark.parametrize("place", ["checkpoints/step-000003", "."])
def test_a_changed_tokenizer_is_refused(place, refuse, copied, settings):
    path = copied / place / "tokenizer.json"
    values = json.loads(path.read_text())
    vocab = values["model"]["vocab"]
    vocab["a"], vocab["b"] = vocab["b"], vocab["a"]
    path.write_text(json.dumps(values))
    words = ("--run", copied, "--resume", *settings, "--set", "training.steps=5")
    line = refuse("evaluate", copied) if place != "." else refuse("train", "tiny", *words)
    assert "tokenizer" in line
    assert "changed" in line


def test_a_checkpoint_of_another_kind_of_model_is_refused(refuse, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    assert "error: " in refuse("evaluate", tmp_path, "--corpus", "python:typer")


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("--capacity", "7"), "at least num_neighbors = 8"),
        (("--capacity", "0,x"), "whole numbers from 0 on with commas between"),
        (("--capacity", "-8"), "whole numbers from 0 on with commas between"),
        (("--corpus", "fiels:x"), "did you mean 'files'?"),
        (("--use", "test"), "no document of"),
        (("--use", "tset"), "'tset' is not one of"),
        (("--against", "missing"), "holds no checkpoint"),
        (("--rows", "0"), "--rows"),
        (("--index", "faiss_hsnw"), "did you mean 'faiss_hnsw'?"),
        (("--index", "int8:oversample=0"), "int8.oversample is 0; allowed: 1 or more"),
        (("--capacity", "0", "--plot", "a.png"), "no memory to draw"),
    ],
)
def test_evaluation_refuses(words, expected, refuse, trained):
    assert expected in refuse("evaluate", trained, *words)


def test_controls_that_cannot_be_are_refused_before_anything_is_read(trained):
    read = []
    with pytest.raises(ConfigError, match="needs at least two documents, and there is 1"):
        report_run(
            trained,
            controls=["other_document"],
            against=trained,
            num_documents=1,
            progress=lambda *counts: read.append(counts),
        )
    assert not read


def test_runs_with_different_tokenizers_are_not_compared(refuse, run, trained, settings, tmp_path):
    words = (*settings, "--set", "tokenizer.kind=unigram", "--set", "training.steps=1")
    assert run("train", "tiny", "--run", tmp_path / "other", *words).status == 0
    assert "different tokenizers" in refuse("evaluate", trained, "--against", tmp_path / "other")


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("evaluate", "missing"), "missing holds no checkpoint"),
        (("info", "recpies"), "did you mean 'recipes'?"),
        (("info", "missing.toml"), "cannot read recipe file"),
        (("benchmark", "step", "--entries", "3"), "at least num_neighbors = 32"),
        (("benchmark", "step", "--entries", "many"), "--entries is 'many'"),
        (("trian", "tiny"), "Did you mean 'train'?"),
        (("train", "tiny"), "Missing option '--run'"),
        (("benchmark", "search", "--entries", "31"), "at least the 32 neighbors"),
        (("benchmark", "search", "--entries", "-1"), "--entries is '-1'"),
        (("benchmark", "search", "--heads", "0"), "num_heads is 0; allowed: 1 or more"),
        (("benchmark", "search", "--indexes", "exact;faiss_hnws"), "did you mean 'faiss_hnsw'?"),
        (
            ("benchmark", "search", "--indexes", "int8:oversampel=3"),
            "did you mean 'int8.oversample",
        ),
        (("benchmark", "search", "--indexes", ";"), "give at least one, and each once"),
        (("benchmark", "search", "--recorded", "missing"), "memorizing benchmark record RUN"),
        (("benchmark", "search", "--no-random"), "give a recording, or use random keys"),
        (("benchmark", "record", "missing", "--out", "a"), "missing holds no checkpoint"),
        (("benchmark", "record", "missing"), "Missing option '--out'"),
        (("benchmark",), "Missing command"),
        (("train", "tiny", "--rnu", "x"), "--run"),
    ],
)
def test_a_word_that_cannot_be_right_is_refused(words, expected, refuse, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert expected in refuse(*words)


def test_recording_refuses_what_the_model_does_not_have(refuse, trained, tmp_path):
    words = ("benchmark", "record", trained, "--out", tmp_path / "a.recorded")
    assert "layer 0 has no memory" in refuse(*words, "--layer", "0")
    assert "at least num_neighbors = 8" in refuse(*words, "--entries", "7")
    assert "record fewer entries" in refuse(*words, "--entries", "100000")
    assert not (tmp_path / "a.recorded").exists()
