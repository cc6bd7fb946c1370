"""`memorizing train`."""

import json
import math
import shlex
import shutil

import pytest

from memorizing.cli.train import describe_resuming


def test_training_says_what_it_did_and_where(run, settings, tmp_path):
    outcome = run(
        "train", "tiny", "--run", tmp_path / "run", *settings, "--json", tmp_path / "a.json"
    )
    assert outcome.status == 0
    assert "trained after 3 steps, " in outcome.out
    assert f"run folder: {tmp_path / 'run'}" in outcome.out
    values = json.loads((tmp_path / "a.json").read_text())
    assert (values["steps"], values["interrupted"]) == (3, False)
    assert values["run_dir"] == str(tmp_path / "run")


def test_a_loaded_run_evaluates_to_what_training_measured(run, settings, tmp_path):
    trained, evaluated = tmp_path / "trained.json", tmp_path / "evaluated.json"
    words = ("--set", "training.evaluate_every=3", "--set", "training.evaluate_tokens=1000000")
    start = ("train", "tiny", "--run", tmp_path / "run", "--json", trained)
    assert run(*start, *settings, *words).status == 0
    words = ("--capacity", "128", "--json", evaluated)
    assert run("evaluate", tmp_path / "run", *words).status == 0
    perplexity = json.loads(evaluated.read_text())["perplexity"]["128"]
    measured = math.exp(json.loads(trained.read_text())["validation_nats"])
    assert perplexity == pytest.approx(measured, rel=1e-6)


def test_resuming_a_finished_run_with_more_steps_goes_on(run, settings, tmp_path):
    words = ("train", "tiny", "--run", tmp_path / "run", *settings)
    assert run(*words).status == 0
    outcome = run(*words, "--set", "training.steps=5", "--resume")
    assert outcome.status == 0
    assert "trained after 5 steps" in outcome.out


def test_the_command_that_is_shown_after_ctrl_c_resumes_the_run(run, trained, settings, tmp_path):
    folder = shutil.copytree(trained, tmp_path / "a folder")
    command = shlex.split(describe_resuming("tiny", folder, settings[1::2]))
    outcome = run(*command[1:])
    assert outcome.status == 0
    assert "resumed from step-000003" in outcome.err
    assert "another setting" not in outcome.err


def test_overwriting_replaces_the_run(run, settings, tmp_path):
    words = ("train", "tiny", "--run", tmp_path / "run", *settings)
    assert run(*words).status == 0
    outcome = run(*words, "--set", "training.steps=1", "--overwrite")
    assert outcome.status == 0
    assert "trained after 1 steps" in outcome.out
