"""RULER by lm-eval: which cells are measured."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from tests.experiments.scripts import EXPERIMENTS, open_script


@pytest.fixture(scope="module")
def script() -> Iterator[ModuleType]:
    with open_script("ruler", EXPERIMENTS / "pretrained") as module:
        yield module


def make_options(folder: Path, **changes: Any) -> argparse.Namespace:
    values: dict[str, Any] = {
        "model": folder / "model",
        "json": folder / "ruler.json",
        "arms": ["native", "entries"],
        "tasks": ["ruler_vt"],
        "lengths": [8192, 4096],
        "samples": 2,
        "native": 4096,
        "window": 8,
        "layer": 1,
        "precision": "fp32",
    }
    return argparse.Namespace(**(values | changes))


def test_cells_that_are_there_are_not_measured_again_and_native_ends_where_the_model_does(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[int, str, str]] = []

    made: list[str] = []

    def make_model(options, arm):
        made.append(arm)
        return arm

    def measure_cell(options, model, length, task, arm):
        assert model == arm == made[-1]
        asked.append((length, task, arm))
        if len(asked) == 2:
            raise KeyboardInterrupt
        return {"length": length, "task": task, "arm": arm, "share": 0.5}

    monkeypatch.setattr(script, "make_model", make_model)
    monkeypatch.setattr(script, "measure_cell", measure_cell)
    assert script.run_command(script.measure, make_options(tmp_path)) == 130
    assert script.run_command(script.measure, make_options(tmp_path)) == 0
    cells = [(4096, "ruler_vt", "native"), (4096, "ruler_vt", "entries")]
    assert asked == [*cells, cells[1], (8192, "ruler_vt", "entries")]
    kept = json.loads((tmp_path / "ruler.json").read_text())
    assert [cell["length"] for cell in kept["cells"]] == [4096, 4096, 8192]
    # A model is loaded once for all tasks.
    script.measure(make_options(tmp_path, lengths=[4096], tasks=["ruler_cwe", "ruler_fwe"]))
    assert made == ["native", "entries", "entries", "entries", "native", "entries"]
    assert [task for _, task, _ in asked[-4:]] == ["ruler_cwe", "ruler_fwe"] * 2
    # Other settings are other cells.
    script.measure(make_options(tmp_path, samples=3, lengths=[4096], arms=["native"]))
    assert asked[-1] == cells[0]
    kept = json.loads((tmp_path / "ruler.json").read_text())
    assert (kept["samples"], len(kept["cells"])) == (3, 1)
