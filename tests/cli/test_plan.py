"""`memorizing plan`."""

import json

import pytest

from memorizing.cli.plan import parse_count


def test_a_training_is_planned_as_a_table_and_as_json(run, tmp_path):
    path = tmp_path / "plan.json"
    outcome = run(
        "plan", "--model", "paper_8b", "--capacity", 262_144, "--rows", 256, "--gpus", 64,
        "--json", path,
    )  # fmt: skip
    assert outcome.status == 0
    assert "6,573,691,968 weights" in outcome.out
    assert "8.00 GiB a row, 2,048.0 GiB in all" in outcome.out
    result = json.loads(path.read_text())
    assert result["recipe"] == "paper_8b"
    chosen = result["ways"][result["chosen"]]
    assert chosen["settings"] == {"training.shard": True, "training.optimizer": "adamw"}
    assert chosen["bytes"]["all"] < 80 * 2**30
    assert max(map(len, outcome.out.splitlines()[:20])) <= 110


def test_what_does_not_fit_is_told(run):
    outcome = run("plan", "--model", "tiny", "--hardware", "gpu_gib=0.000001")
    assert outcome.status == 0
    assert "nothing of it fits into 1e-06 GiB: lower rows or capacity" in outcome.out


def test_a_served_memory_is_planned(run, llama):
    outcome = run("plan", "--hub", llama, "--entries", "1e6", "--shards", 4, "--heads", "1:0")
    assert outcome.status == 0
    assert "1,000,000 entries of layer 1, heads 0, read as passages, in 4 shards" in outcome.out
    assert "once in 32 tokens" in outcome.out
    assert "search_gb_s=" in outcome.out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "Give --model RECIPE to train, or --hub MODEL to serve"),
        (["--model", "tiny", "--hub", "x"], "Give --model RECIPE to train, or --hub MODEL"),
        (["--model", "tiny", "--entries", "5"], "--entries is 5; it goes with --hub"),
        (["--hub", "x", "--rows", "5"], "--rows is 5; it goes with --model"),
        (["--hub", "x"], "--entries is not given; allowed: 1 or more"),
        (["--model", "tiny", "--hardware", "gpu_gb=3"], "did you mean 'hardware.gpu_gib'"),
        (["--model", "tiny", "--hardware", "tflops"], "write KEY=VALUE"),
    ],
)
def test_what_cannot_be_planned_is_refused(refuse, words, said):
    assert said in refuse("plan", *words)


@pytest.mark.parametrize(
    ("text", "expected"), [("7", 7), ("1e9", 10**9), ("1_000", 1000), ("2.5e3", 2500)]
)
def test_a_count_may_be_written_with_an_exponent(text, expected):
    assert parse_count(text) == expected


@pytest.mark.parametrize("text", ["0", "1.5", "-3", "inf", "nan", "many", "1e-3", "", "1e999"])
def test_other_counts_are_refused(refuse, text):
    said = refuse("plan", "--hub", "x", f"--entries={text}")
    assert f"--entries is {text!r}; allowed" in said
