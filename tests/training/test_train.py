"""From a configuration, as the command line does it."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from memorizing.config import Config, DataConfig
from memorizing.errors import (
    CheckpointError,
    ConfigError,
    CorpusError,
    NonFiniteLossError,
    ResourceError,
    RunFolderError,
)
from memorizing.model import MemorizingTransformer
from memorizing.model.block import is_of_memory
from memorizing.training import list_checkpoints, load_model, read_metrics, read_run_config, train
from memorizing.training.run_folder import TRAINING, open_run


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEMORIZING_CACHE", str(tmp_path / "cache"))


def compare_checkpoints(first: Path, second: Path) -> None:
    for file in ("model.safetensors", "optimizer.safetensors", "state.safetensors"):
        ours, theirs = load_file(first / file), load_file(second / file)
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())


def test_a_run_leaves_a_folder_that_says_everything_about_it(
    config: Config, tmp_path: Path
) -> None:
    result = train(config, tmp_path / "run", progress=False)
    run = tmp_path / "run"
    assert (result.steps, result.interrupted, result.run_dir) == (6, False, run)
    assert {path.name for path in run.iterdir()} >= {
        "config.toml", "run.json", "metrics.jsonl", "log.txt", "tokenizer.json", "checkpoints",
    }  # fmt: skip
    model, model_config, tokenizer = load_model(run)
    assert tokenizer is not None
    assert model_config.vocab_size == tokenizer.vocab_size == model.embedding.num_embeddings
    assert read_run_config(run).training == config.training
    lines = read_metrics(run / "metrics.jsonl")
    steps = [line["step"] for line in lines if "train" in line]
    assert steps == [1, 2, 3, 4, 5, 6]
    assert [line["step"] for line in lines if "validation" in line] == [3, 6]
    assert lines[-1]["validation"]["nats_per_token"] == result.validation_nats
    train_line = next(line["train"] for line in reversed(lines) if "train" in line)
    assert train_line["tokens"] == result.tokens
    assert len(train_line["gate"]["1"]) == 2
    assert 0 < train_line["memory_fill"]["1"] <= 1
    log = (run / "log.txt").read_text()
    assert "precision fp32" in log
    assert "training tokens in 6 documents" in log


def test_the_same_seed_gives_the_same_run_and_another_seed_another(
    config: Config, tmp_path: Path
) -> None:
    other = replace(config, training=replace(config.training, seed=1))
    nats = []
    for name, each in (("a", config), ("b", config), ("c", other)):
        train(each, tmp_path / name, progress=False)
        lines = read_metrics(tmp_path / name / "metrics.jsonl")
        nats.append([line["train"]["nats_per_token"] for line in lines if "train" in line])
    assert nats[0] == nats[1]
    assert nats[0] != nats[2]


SCRIPT = """
import sys, tomllib, torch
from pathlib import Path
from memorizing.config import Config
from memorizing.training import train
torch.set_num_threads(1)
config = Config.from_dict(tomllib.loads(Path(sys.argv[1]).read_text()))
result = train(config, sys.argv[2])
print("interrupted", result.interrupted, flush=True)
"""


def test_a_process_that_gets_sigterm_saves_exits_cleanly_and_resumes(
    config: Config, tmp_path: Path
) -> None:
    # Long enough that the signal comes in the middle; the run that never stops is cut to the same.
    # Nothing but the signal makes a checkpoint.
    training = replace(
        config.training, steps=100_000, schedule="constant", checkpoint_every=0, evaluate_every=0
    )
    long = replace(config, training=training)
    (tmp_path / "config.toml").write_text(long.to_toml())
    (tmp_path / "script.py").write_text(SCRIPT)
    run = tmp_path / "run"
    process = subprocess.Popen(
        [sys.executable, tmp_path / "script.py", tmp_path / "config.toml", run],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    metrics = run / "metrics.jsonl"
    deadline = time.monotonic() + 60
    while not (metrics.exists() and metrics.read_text().count("\n") >= 5):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    assert "interrupted True" in output
    step = int(list_checkpoints(run)[-1].name[5:])
    assert f"SIGTERM: stopped after step {step}" in errors
    assert [path.name for path in (run / "checkpoints").iterdir() if path.name[0] == "."] == []

    last = replace(long, training=replace(long.training, steps=step + 3))
    resumed = train(last, run, resume=True, progress=False)
    assert resumed.steps == step + 3
    straight = train(last, tmp_path / "straight", progress=False)
    assert resumed.tokens == straight.tokens
    compare_checkpoints(list_checkpoints(run)[-1], list_checkpoints(tmp_path / "straight")[-1])
    sessions = json.loads((run / "run.json").read_text())["sessions"]
    assert len(sessions) == 2
    assert f"resumed from step-{step:06d}" in (run / "log.txt").read_text()


def test_a_finished_run_that_is_resumed_takes_no_step(config: Config, tmp_path: Path) -> None:
    first = train(config, tmp_path / "run", progress=False)
    again = train(config, tmp_path / "run", resume=True, progress=False)
    assert (again.steps, again.tokens) == (first.steps, first.tokens)


def test_a_run_without_a_checkpoint_starts_again(config: Config, tmp_path: Path) -> None:
    train(config, tmp_path / "run", progress=False)
    for checkpoint in list_checkpoints(tmp_path / "run"):
        for path in checkpoint.iterdir():
            path.unlink()
        checkpoint.rmdir()
    result = train(config, tmp_path / "run", resume=True, progress=False)
    assert result.steps == 6
    assert "no checkpoint yet" in (tmp_path / "run" / "log.txt").read_text()


def test_an_existing_run_is_refused_before_anything_is_read(config: Config, tmp_path: Path) -> None:
    train(config, tmp_path / "run", progress=False)
    unreadable = replace(config, data=DataConfig(corpus="files:/nowhere"))
    with pytest.raises(RunFolderError, match="holds a run already"):
        train(unreadable, tmp_path / "run", progress=False)
    train(config, tmp_path / "run", progress=False, overwrite=True)


def test_a_corpus_that_cannot_be_read_leaves_no_folder(config: Config, tmp_path: Path) -> None:
    unreadable = replace(config, data=DataConfig(corpus=f"files:{tmp_path / 'nowhere'}"))
    with pytest.raises(CorpusError):
        train(unreadable, tmp_path / "run", progress=False)
    assert not (tmp_path / "run").exists()


def test_too_little_memory_is_refused_before_training_starts(
    config: Config, tmp_path: Path
) -> None:
    model = replace(config.model, capacity=2**44)
    with pytest.raises(ResourceError, match=r"capacity 17,592,186,044,416 in 4 rows"):
        train(replace(config, model=model), tmp_path / "run", progress=False)
    assert not (tmp_path / "run").exists()


def test_evaluating_without_held_out_documents_is_refused(config: Config, tmp_path: Path) -> None:
    data = replace(config.data, validation=())
    with pytest.raises(ConfigError, match=r"data\.validation"):
        train(replace(config, data=data), tmp_path / "run", progress=False)
    assert not (tmp_path / "run").exists()


def test_a_run_whose_corpus_has_changed_is_not_resumed(config: Config, tmp_path: Path) -> None:
    train(config, tmp_path / "run", progress=False)
    (tmp_path / "texts" / "text1.txt").write_text("something else entirely")
    with pytest.raises(CorpusError, match="other documents"):
        train(config, tmp_path / "run", resume=True, progress=False)


def test_a_run_goes_on_from_the_last_checkpoint_that_is_whole(
    config: Config, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    # Without evaluations no checkpoint is the best, which would be kept beside the last.
    settings = ["training.checkpoint_every=1", "training.keep_checkpoints=1"]
    config = config.replace([*settings, "training.evaluate_every=0"])
    run = tmp_path / "run"
    train(config, run, progress=False)
    (last,) = list_checkpoints(run)
    before = shutil.copytree(last, tmp_path / "before")
    shutil.copytree(last, last.with_name("step-000090"))
    state = last.with_name("step-000090") / "state.safetensors"
    state.write_bytes(state.read_bytes()[:100])
    longer = config.replace([f"training.steps={config.training.steps + 1}"])
    train(longer, run, resume=True)
    told = " ".join(capfd.readouterr().err.split())
    assert "state.safetensors is truncated" in told
    assert f"it goes on from {last.name} now" in told
    # What is damaged is not what the run keeps.
    kept, damaged = list_checkpoints(run)
    assert kept.name == "step-000007"
    assert damaged.name == "step-000090"
    for path in (kept, damaged):
        shutil.rmtree(path)
    shutil.copytree(before, last)
    (last / "state.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"state\.safetensors is truncated"):
        train(longer, run, resume=True, progress=False)


def test_a_run_starts_with_the_weights_and_tokenizer_of_another(
    config: Config, tmp_path: Path
) -> None:
    plain = replace(config, model=replace(config.model, memory_layers=(), capacity=0))
    train(plain, tmp_path / "plain", progress=False)
    settings = ["training.learning_rate=1e-12", "training.gate_learning_rate=1e-12"]
    later = config.replace([f"training.start_from={tmp_path / 'plain'}", "training.steps=1"])
    result = train(later.replace(settings), tmp_path / "later", progress=False)
    assert result.steps == 1
    first, second = load_model(tmp_path / "plain"), load_model(tmp_path / "later")
    theirs = first.model.state_dict()
    fresh = MemorizingTransformer(second.config).state_dict()
    for name, weight in second.model.state_dict().items():
        if is_of_memory(name):  # what only a memory layer has keeps its start
            if name == "pointer.inner_weight":  # drawn
                assert weight.std() == pytest.approx(fresh[name].std().item(), rel=0.2)
                continue
            start = fresh[name] if name.startswith("pointer.") else torch.zeros_like(weight)
            torch.testing.assert_close(weight, start)
        else:
            torch.testing.assert_close(weight, theirs[name], atol=1e-6, rtol=1e-6)
    assert second.tokenizer is not None
    assert first.tokenizer is not None
    assert second.tokenizer.fingerprint == first.tokenizer.fingerprint


def test_a_run_that_was_started_from_another_resumes_without_it(
    config: Config, tmp_path: Path
) -> None:
    train(config, tmp_path / "first", progress=False)
    later = config.replace([f"training.start_from={tmp_path / 'first'}"])
    train(later, tmp_path / "later", progress=False)
    (tmp_path / "first").rename(tmp_path / "gone")
    longer = later.replace(["training.steps=8"])
    assert train(longer, tmp_path / "later", progress=False, resume=True).steps == 8


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ("model.model_dim=17", CheckpointError, "another model"),
        ("training.start_from=nowhere", CheckpointError, "holds no checkpoint"),
    ],
)
def test_weights_that_do_not_fit_are_not_started_from(
    config: Config, tmp_path: Path, change: str, error: type[Exception], message: str
) -> None:
    train(config, tmp_path / "first", progress=False)
    later = config.replace([f"training.start_from={tmp_path / 'first'}", change])
    with pytest.raises(error, match=message):
        train(later, tmp_path / "later", progress=False)


def read_all(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.name != "lock"
    }


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        (["model.model_dim=17"], CheckpointError),
        (["training.learning_rate=1e30", "training.clip_norm=0"], NonFiniteLossError),
        (["data.corpus=files:/nowhere"], CorpusError),
        (["model.capacity=17592186044416"], ResourceError),
        (["model.num_layers=9007199254740992"], ResourceError),
        (["model.model_dim=9007199254740992"], ResourceError),
    ],
)
def test_an_overwriting_that_fails_leaves_the_old_run_as_it_was(
    config: Config, tmp_path: Path, changes: list[str], error: type[Exception]
) -> None:
    run = tmp_path / "run"
    train(config, run, progress=False)
    before = read_all(run)
    # Weights that would overflow at the first step already.
    if error is NonFiniteLossError:
        config = config.replace(["model.scale_init=1e30"])
    if error is CheckpointError:
        config = config.replace([f"training.start_from={run}"])
    with pytest.raises(error):
        train(config.replace(changes), run, progress=False, overwrite=True)
    assert read_all(run) == before
    assert train(read_run_config(run), run, progress=False, resume=True).steps == 6


def test_a_run_starts_with_the_weights_of_the_one_that_it_replaces(
    config: Config, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    train(config, run, progress=False)
    old = load_model(run).model.state_dict()
    settings = [f"training.start_from={run}", "training.learning_rate=1e-12", "training.steps=1"]
    settings += ["training.gate_learning_rate=1e-12"]
    train(config.replace(settings), run, progress=False, overwrite=True)
    assert [path.name for path in list_checkpoints(run)] == ["step-000001"]
    for name, weight in load_model(run).model.state_dict().items():
        torch.testing.assert_close(weight, old[name], atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("has_checkpoint", [False, True])
def test_a_run_that_was_killed_before_it_had_a_tokenizer_resumes(
    config: Config, tmp_path: Path, has_checkpoint: bool
) -> None:
    run = tmp_path / "run"
    straight = train(config, run, progress=False)
    (run / "tokenizer.json").unlink()
    if not has_checkpoint:
        shutil.rmtree(run / "checkpoints")
    longer = config if not has_checkpoint else config.replace(["training.steps=7"])
    result = train(longer, run, progress=False, resume=True)
    assert result.steps == longer.training.steps
    if not has_checkpoint:
        assert result.train_nats == straight.train_nats
    assert (run / "tokenizer.json").is_file()


def test_a_run_that_is_trained_is_not_trained_by_another_process(
    config: Config, tmp_path: Path
) -> None:
    run, refused = tmp_path / "run", 0
    train(config.replace(["training.steps=2"]), run, progress=False)
    before = read_all(run)
    with open_run(run, TRAINING, resume=True):
        for flags in ({}, {"resume": True}, {"overwrite": True}):
            with pytest.raises(RunFolderError, match=f"process {os.getpid()} on"):
                train(config, run, progress=False, **flags)
            refused += 1
    assert (refused, read_all(run)) == (3, before)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_layers": 2**53}, "layers"),
        ({"num_layers": 2}, "layers"),
        ({"vocab_size": 2**31}, "embedding"),
        ({"vocab_size": 2**62}, "embedding|was altered"),
        ({"model_dim": 2**40}, "another model|was altered"),
        ({"num_heads": 2**40}, "another model|was altered"),
    ],
)
def test_sizes_that_are_not_those_of_the_weights_are_refused_before_anything_is_allocated(
    config: Config, tmp_path: Path, changes: dict[str, int], message: str
) -> None:
    train(
        config.replace(["training.steps=1", "training.evaluate_every=0"]),
        tmp_path / "run",
        progress=False,
    )
    [checkpoint] = list_checkpoints(tmp_path / "run")
    values = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(json.dumps(values | changes))
    (checkpoint / "manifest.json").unlink()
    with pytest.raises(CheckpointError, match=message):
        load_model(tmp_path / "run")
