"""What several processes train and evaluate is what one does: read from what `launch` did."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from memorizing.training import read_metrics

ROWS, STEPS, TIMEOUT_S = 5, 6, 4
"""As `launch` has them, which imports much that this process does not need."""
CLOSE: dict[str, Any] = {"rtol": 2e-5, "atol": 2e-6}
"""Sums of the same fp32 numbers in another order, after a few steps of an optimizer."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("accelerate")
    folder = tmp_path_factory.mktemp("ranks")
    root = Path(__file__).parents[2]
    words = [sys.executable, "-m", "tests.ranks.launch", str(folder)]
    done = subprocess.run(words, cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="module")
def results(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "results.json").read_text())


def get_values(results: dict[str, Any], name: str) -> list[Any]:
    """What the processes returned; all ended well."""
    assert [one["status"] for one in results[name]] == [0] * len(results[name]), results[name]
    return [one["value"] for one in results[name]]


def load_checkpoint(run: Path, step: int = STEPS) -> dict[str, torch.Tensor]:
    """Without what waits for the end of a segment: only rows that end their documents have any,
    and where rows are read together it is there for all of them."""
    files = ("model", "optimizer", "state")
    folder = run / "checkpoints" / f"step-{step:06d}"
    return {
        f"{file}/{name}": tensor
        for file in files
        for name, tensor in load_file(folder / f"{file}.safetensors").items()
        if not name.startswith("rng.") and ".staged." not in name
    }


MUON_ATOL = 5e-4
"""Of weights in parts, which Muon trains: it makes small singular values 1, and 500 times as much
of their rounding. 5e-5 of a weight at step 4, 2e-4 of what it computes at step 6, from 1e-7 at step
2; a step is 3e-3."""


def assert_close(
    first: dict[str, torch.Tensor], second: dict[str, torch.Tensor], atol: float = 1e-4
) -> None:
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        # What is kept in bf16 may be rounded to its neighbor.
        rtol = 1e-3 if tensor.dtype != torch.bfloat16 else 2**-7
        torch.testing.assert_close(tensor, second[name], rtol=rtol, atol=atol, msg=name)


def test_the_steps_of_two_processes_are_those_of_one(results):
    (one,) = get_values(results, "train 1")
    first, second = get_values(results, "train 2")
    assert first == second
    assert len(first["steps"]) == first["last"] == STEPS
    np.testing.assert_allclose(first["steps"], one["steps"], **CLOSE)
    assert first["validation"] == pytest.approx(one["validation"], rel=1e-5)


def test_two_processes_write_what_one_writes(folder):
    one, two = folder / "train 1", folder / "train 2"
    assert_close(load_checkpoint(one), load_checkpoint(two))
    rows = {name.split(".")[1] for name in load_checkpoint(two) if "row." in name}
    assert rows == {str(row) for row in range(ROWS)}
    fills = [
        [line["train"]["memory_fill"]["1"] for line in read_metrics(run / "metrics.jsonl")
         if "train" in line]
        for run in (one, two)
    ]  # fmt: skip
    assert fills[0] == pytest.approx(fills[1])
    assert len(fills[0]) == STEPS // 2


@pytest.mark.parametrize(
    ("run", "names"),
    [
        ("train 1-2-1", ("train 1-2 2", "train 1-2-1 1")),
        ("train 2-3", ("train 2-3",)),
        ("sharded 1-2", ("sharded 1-2 2",)),
        ("sharded 2-1", ("sharded 2-1 1",)),
    ],
)
def test_a_run_goes_on_in_another_number_of_processes(results, folder, run, names):
    like = f"{run.partition(' ')[0]} 1"
    (one,) = get_values(results, like)
    steps = [step for name in names for step in get_values(results, name)[0]["steps"]]
    np.testing.assert_allclose(steps, one["steps"][2:], **CLOSE)
    atol = MUON_ATOL if like.startswith("sharded") else 1e-4
    assert_close(load_checkpoint(folder / run), load_checkpoint(folder / like), atol)


def test_weights_in_parts_learn_and_are_written_as_whole_ones_are(results, folder):
    (one,) = get_values(results, "sharded 1")
    first, second = get_values(results, "sharded 2")
    held = [values.pop("held") for values in (one, first, second)]
    assert first == second
    np.testing.assert_allclose(first["steps"], one["steps"], **CLOSE)
    assert first["validation"] == pytest.approx(get_values(results, "sharded 2, whole 1")[0])
    # 2e-6 to 2e-5, by the weights of step 6 above; a step of training moves it by 1e-2.
    assert first["validation"] == pytest.approx(one["validation"], rel=1e-4)
    whole, dealt = (load_checkpoint(folder / f"sharded {size}") for size in (1, 2))
    assert_close(whole, dealt, MUON_ATOL)
    assert whole["model/embedding.weight"].shape == (31, 13)  # 16 and 15 rows
    assert held[2] < held[1] < 0.6 * held[0]


def test_a_run_that_was_killed_goes_on_bit_for_bit_in_as_many_processes(results, folder):
    whole, resumed = load_checkpoint(folder / "train 2"), load_checkpoint(folder / "killed")
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(tensor, resumed[name]) for name, tensor in whole.items())
    last = get_values(results, "killed, resumed")[0]
    assert last["steps"] == get_values(results, "train 2")[0]["steps"][2:]


def test_a_process_that_is_killed_ends_the_others_who_name_it(results):
    survivor, killed = results["killed"]
    assert killed["status"] == -9
    assert survivor["status"] == 2
    assert "RankError: rank 1 of 2 is gone" in survivor["err"]
    assert "resume" in survivor["err"]
    assert survivor["seconds"] - killed["seconds"] < 2 * TIMEOUT_S


def test_a_process_that_stands_still_ends_the_others_who_name_it(results):
    survivor, stopped = results["stalled"]
    assert stopped["status"] == -9  # by the launcher, when the other had ended
    assert survivor["status"] == 2
    assert "RankError: rank 1 of 2 is gone" in survivor["err"]
    assert TIMEOUT_S / 2 < survivor["seconds"] < 4 * TIMEOUT_S


@pytest.mark.parametrize("who", [0, 1])
@pytest.mark.parametrize(
    ("when", "named"), [("absent", "rank {} of 2 has not come"), ("gone", "rank {} of 2 is gone")]
)
def test_a_process_that_ends_before_all_are_connected_is_named(results, who, when, named):
    survivor = results[f"{when} {who}"][1 - who]
    assert survivor["status"] in (2, 3)  # of the library, or of `launch`
    assert f"RankError: {named.format(who)}" in survivor["err"]
    assert survivor["seconds"] < 4 + 10  # the limit, and what a busy machine may take besides


def test_a_process_that_comes_late_is_waited_for(results):
    assert [one["status"] for one in results["late"]] == [20, 20], results["late"]


def test_a_signal_to_one_process_ends_all_after_the_same_step(results, folder):
    values = get_values(results, "stopped")
    assert [(value["stopped"], value["last"]) for value in values] == [(True, 3)] * 2
    assert (folder / "stopped" / "checkpoints" / "step-000003").is_dir()


@pytest.mark.parametrize("kind", ["own", "pretrained", "spread"])
@pytest.mark.parametrize("control", ["None", "off", "other_document", "shuffled"])
def test_an_evaluation_gives_the_same_nats(results, kind, control):
    (one,) = get_values(results, "evaluate 1")
    first, second = get_values(results, "evaluate 2")
    assert first == second
    for mine, theirs in zip(one[kind][control], first[kind][control], strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-4, atol=1e-5)


def test_a_memory_that_is_spread_finds_what_one_memory_finds(results):
    for values in get_values(results, "search 2"):
        assert values["held"] == 0.5
        assert len(values["differs"]) == 6 * 4 * 9
        assert not any(values["differs"])


def test_gates_that_have_no_gradient_in_any_process_are_not_stepped(results):
    (one,) = get_values(results, "gates 1")
    first, second = get_values(results, "gates 2")
    assert first == second
    assert first["steps"][0][2] == 0  # no memory holds anything yet
    np.testing.assert_allclose(first["steps"], one["steps"], rtol=1e-4)


@pytest.mark.parametrize("train", ["lora", "all", "passages", "passages in parts"])
def test_finetuning_begins_in_two_processes_and_goes_on_in_one(results, train):
    (one,) = get_values(results, f"{train} 1")
    first, second = get_values(results, f"{train} 2")
    assert first == second
    steps = first["steps"] + get_values(results, f"{train} 2-1 1")[0]["steps"]
    np.testing.assert_allclose(steps, one["steps"], rtol=1e-4)


def test_what_differs_or_cannot_be_shared_is_refused_in_all_processes(results):
    first, second = get_values(results, "refuse 2")
    assert first == second
    differs, rows, crossbatch, *sharded, divided, equal = first["refused"]
    assert [one.partition(" is ")[0] for one in sharded] == [
        "training.shard",
        "training.crossbatch_segments",
        "training.optimizer",
        "finetune.shard",
        "finetune.shard",
    ]
    assert "rank 1 of 2 has another number than rank 0" in differs
    assert "2 processes and 1 rows" in rows
    assert "training.crossbatch_rows is 2" in crossbatch
    assert "must be a multiple" in divided
    assert equal == ""
    assert first["rows"] == [[0, 0, 1], [1, 2, 3], [2, 4, 5, 6]]


def test_the_commands_show_once_what_they_show_in_one_process(results, folder):
    for verb in ("train", "evaluate"):
        get_values(results, f"cli {verb} 2")
        alone, main, other = *results[f"cli {verb} 1"], *results[f"cli {verb} 2"]
        assert other["out"] + other["err"] == ""
        shown, expected = (one["out"].splitlines() for one in (main, alone))
        assert len(shown) == len(expected) > 1
    assert "2 processes read 3 rows" in results["cli train 2"][0]["err"]
    session = json.loads((folder / "cli 2" / "run.json").read_text())["sessions"][0]
    assert session["processes"] == 2
    found = [json.loads((folder / f"evaluated {size}.json").read_text()) for size in (1, 2)]
    assert found[0]["perplexity"] == pytest.approx(found[1]["perplexity"], rel=1e-4)
    assert set(found[0]["perplexity"]) == {"0", "23", "other_document"}


def test_an_error_is_told_once_and_by_the_main_process(results):
    main, other = results["cli train again"]
    assert main["status"] == other["status"] == 2
    assert "holds a run already" in main["err"]
    assert "error:" not in other["err"]
