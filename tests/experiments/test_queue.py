"""The queue of experiments: its plan can be run, jobs go on where they stopped."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

QUEUE = Path(__file__).parents[2] / "experiments" / "queue"
sys.path.insert(0, str(QUEUE))

import running  # noqa: E402
from claims import claim, is_claimed  # noqa: E402
from jobs import Evaluation, Job  # noqa: E402
from plan import find_jobs, list_jobs  # noqa: E402
from running import load_job_config, run_job  # noqa: E402
from status import describe_progress  # noqa: E402

RECIPE = """
[model]
vocab_size = 307
num_layers = 2
model_dim = 13
num_heads = 2
head_dim = 7
ffn_dim = 23
segment_len = 11
window = 11
memory_layers = [1]
capacity = 29
num_neighbors = 3
conv_len = 3
[tokenizer]
vocab_size = 307
[data]
corpus = "files:{folder}"
test = ["test*"]
validation = ["valid*"]
[training]
steps = 4
rows = 2
precision = "fp32"
log_every = 1
evaluate_every = 2
evaluate_tokens = 50
checkpoint_every = 1
[evaluation]
capacities = [29]
max_tokens_per_document = 61
"""


@pytest.fixture
def tiny_family(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A recipe of a family named `tiny`; returns the folder of runs."""
    texts, recipes = tmp_path / "texts", tmp_path / "recipes"
    texts.mkdir()
    recipes.mkdir()
    for name in ("train1", "train2", "train3", "test1", "test2", "valid"):
        (texts / f"{name}.txt").write_text(" ".join(f"{name} word{i % 17}" for i in range(40)))
    (recipes / "tiny.toml").write_text(RECIPE.format(folder=texts))
    monkeypatch.setattr(running, "RECIPES", recipes)
    monkeypatch.setenv("MEMORIZING_CACHE", str(tmp_path / "cache"))
    return tmp_path / "runs"


def make_job(arm: str = "memory", **changes: object) -> Job:
    values: dict[str, object] = {
        "settings": (),
        "evaluations": (Evaluation(29), Evaluation(29, "other_document")),
        "tier": 1,
    }
    return Job("main", arm, "tiny", **{**values, **changes})  # type: ignore[arg-type]


def test_every_job_has_a_name_of_its_own_and_settings_that_exist() -> None:
    jobs = list_jobs()
    assert len({job.name for job in jobs}) == len(jobs)
    names = {job.name for job in jobs}
    for job in jobs:
        config = load_job_config(job, Path("runs"))
        assert config.name == job.name
        assert not job.start_from or job.start_from in names
        assert config.model.has_memory or all(e.capacity == 0 for e in job.evaluations)


def test_words_choose_jobs() -> None:
    chosen = find_jobs(["main/proofs", "staleness"])
    assert chosen
    assert all("main/proofs" in job.name or "staleness" in job.name for job in chosen)


def test_a_job_trains_measures_and_writes_what_repeats_it(
    tiny_family: Path, tmp_path: Path
) -> None:
    job = make_job()
    assert run_job(job, tiny_family, tmp_path / "results")
    result = json.loads((tmp_path / "results" / f"{job.name}.json").read_text())
    assert set(result["evaluations"]) == {"29", "29 other_document"}
    measured = result["evaluations"]["29"]
    assert [d["name"] for d in measured["documents"]] == ["test1.txt", "test2.txt"]
    assert measured["tokens"] == sum(min(d["tokens"], 61) for d in measured["documents"])
    blocks = sum(sum(d["block_nats"]) for d in measured["documents"])
    assert blocks == pytest.approx(measured["nats"], abs=0.05)
    assert measured["bytes"] is not None
    assert [v["tokens"] for v in result["training"]["validation"]] == sorted(
        v["tokens"] for v in result["training"]["validation"]
    )
    assert result["training"]["validation"][-1]["tokens"] == result["training"]["tokens"]
    assert (result["seed"], result["commits"], result["command"].split()[-1]) == (
        0,
        result["commits"],
        f"'{job.name}'",
    )


def test_a_finished_training_is_not_done_again_for_another_measurement(
    tiny_family: Path, tmp_path: Path
) -> None:
    job = make_job(evaluations=(Evaluation(29),))
    assert run_job(job, tiny_family, tmp_path / "results")
    log = tiny_family / job.name / "metrics.jsonl"
    before = log.read_bytes()
    more = make_job(evaluations=(Evaluation(29), Evaluation(3)))
    assert run_job(more, tiny_family, tmp_path / "results")
    assert log.read_bytes() == before
    result = json.loads((tmp_path / "results" / f"{job.name}.json").read_text())
    assert set(result["evaluations"]) == {"29", "3"}


def test_a_job_begins_with_the_weights_of_another_or_measures_them(
    tiny_family: Path, tmp_path: Path
) -> None:
    results = tmp_path / "results"
    first = make_job(evaluations=(Evaluation(29),))
    assert run_job(first, tiny_family, results)
    again = make_job("again", start_from=first.name, trains=False)
    assert run_job(again, tiny_family, results)
    tuned = make_job("tuned", start_from=first.name, settings=("training.steps=1",))
    assert run_job(tuned, tiny_family, results)
    found = {
        name: json.loads((results / f"main/tiny-{name}-seed0.json").read_text())
        for name in ("memory", "again", "tuned")
    }
    nats = {name: result["evaluations"]["29"]["nats"] for name, result in found.items()}
    assert nats["memory"] == nats["again"] != nats["tuned"]
    assert found["again"]["trains"] is False


def test_a_job_that_is_claimed_is_not_taken_by_another_process(tmp_path: Path) -> None:
    code = (
        f"import sys; sys.path.insert(0, {str(QUEUE)!r}); from claims import claim; "
        "from pathlib import Path\n"
        f"with claim(Path({str(tmp_path / 'job')!r})) as mine: print(mine)"
    )
    command = [sys.executable, "-c", code]
    with claim(tmp_path / "job") as is_mine:
        assert is_mine
        assert is_claimed(tmp_path / "job")
        assert subprocess.run(command, capture_output=True, text=True).stdout == "False\n"
    assert subprocess.run(command, capture_output=True, text=True).stdout == "True\n"
    assert not is_claimed(tmp_path / "job")


def test_the_status_tells_how_far_a_job_is(tiny_family: Path, tmp_path: Path) -> None:
    job, results = make_job(), tmp_path / "results"
    assert describe_progress(job, tiny_family, results, False) == ("waiting", "")
    assert run_job(job, tiny_family, results)
    state, detail = describe_progress(job, tiny_family, results, False)
    assert state == "done"
    assert detail.startswith("29: ")
    (results / f"{job.name}.json").unlink()
    assert describe_progress(job, tiny_family, results, True) == ("running", "2 of 2 evaluations")


def test_the_queue_says_its_status_from_the_command_line(tmp_path: Path) -> None:
    source = str(QUEUE.parents[1] / "src")
    environment = {**os.environ, "PYTHONPATH": source, "COLUMNS": "200"}
    command = [sys.executable, str(QUEUE), "--status", "main/web", "--runs", str(tmp_path)]
    done = subprocess.run(
        [*command, "--results", str(tmp_path)], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr
    assert "main/web-memory-seed0" in done.stdout
    assert "2 waiting" in done.stdout
