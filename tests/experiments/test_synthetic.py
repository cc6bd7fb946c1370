"""`experiments/synthetic.py`: every task runs, and what is done is not done again."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from tests.experiments.scripts import open_script


@pytest.fixture(scope="module")
def script() -> Iterator[ModuleType]:
    with open_script("synthetic") as module:
        yield module


def shrink(task):
    """A task of the same kind: one arm, fewer steps, a smaller model, the shortest cell."""
    model = dataclasses.replace(task.model, steps=2, model_dim=16, head_dim=8)
    return dataclasses.replace(
        task, arms=task.arms[:1], model=model, cells=task.cells[:1], least_asked=5
    )


def test_every_task_is_trained_and_measured_on_questions_that_fit(script: ModuleType):
    for task in script.TASKS.values():
        for cell in (task.choose_cell(1), task.choose_cell(task.model.steps)):
            batch = task.make([1], cell)
            blocks, questions = divmod(batch.targets.shape[1] - 1, task.block_len)
            assert blocks == cell.num_blocks, task.name
            assert questions, task.name
            assert not batch.valid[:, : blocks * task.block_len].any()
        for arm in task.arms:
            names = [str(cell) for cell in task.list_cells(arm)]
            assert len(set(names)) == len(names), task.name
        for cell in task.cells:
            if cell.num_blocks <= 32:
                length = task.make([1], cell).targets.shape[1]
                assert (length - 1) // task.block_len == cell.num_blocks


def test_a_task_goes_on_where_it_stopped(
    script: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    task = shrink(script.TASKS["needles"])
    script.run_seed(task, 0, tmp_path)
    scores = script.collect(task, [0], tmp_path)["seeds"]["0"]
    assert len(scores) == len(task.list_cells(task.arms[0]))
    for score in scores.values():
        low, high = score["interval"]
        assert 0 <= low <= score["exact"] <= high <= 1
        groups = score["by_group"].values()
        assert sum(group["asked"] for group in groups) == score["asked"]
    capsys.readouterr()
    for seed in (0, 1):
        script.run_seed(task, seed, tmp_path)
    again = script.collect(task, [0, 1], tmp_path)
    assert again["seeds"]["0"] == scores
    assert len(again["machines"]) == 1
    printed = capsys.readouterr().out
    assert "seed 0" not in printed
    assert "seed 1" in printed
    script.show(again)
    table = capsys.readouterr().out
    assert "needles" in table
    assert "other_document" in table
    other = dataclasses.replace(task, least_asked=7)
    with pytest.raises(SystemExit, match="other settings"):
        script.run_seed(other, 0, tmp_path)


def test_an_untrained_model_attends_to_all_documents_of_its_memory_alike(
    script: ModuleType, tmp_path: Path
):
    task = shrink(script.TASKS["distraction"])
    cell = script.Cell(2, {"num_questions": 9}, num_documents_read=4)
    model = script.train_arm(task, task.arms[0], 0, None)
    assert task.arms[0].name == "untrained"
    score = script.measure(model, task, cell, 0)
    alone = script.measure(model, task, dataclasses.replace(cell, num_documents_read=1), 0)
    assert alone["own_share"] == pytest.approx(1)
    assert 0.1 < score["own_share"] < 0.7
    assert score["exact"] == 0
