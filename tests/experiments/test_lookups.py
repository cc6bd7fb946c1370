"""What memory retrieves: sums over documents."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from memorizing.analysis.inspection import Row
from tests.experiments.scripts import open_script


@pytest.fixture(scope="module")
def script() -> Iterator[ModuleType]:
    with open_script("lookups") as module:
        yield module


def test_rows_of_documents_are_summed_by_tokens(script: ModuleType) -> None:
    first = [Row("near", 30, 0.5, None, 1.0, 1.5)]
    second = [Row("near", 10, 0.1, None, 1.0, 1.1), Row("far", 60, -0.1, None, 2.0, 1.9)]
    near, far = script.sum_rows([first, second])
    assert (near["name"], near["tokens"], far["name"], far["tokens"]) == ("near", 40, "far", 60)
    assert (near["share_of_tokens"], far["share_of_tokens"]) == (0.4, 0.6)
    assert near["nats_saved_per_token"] == pytest.approx(16 / 40)
    assert far["nats_saved_per_token"] == pytest.approx(-0.1)
    assert near["share_of_saved"] == pytest.approx(1.6)
    assert far["share_of_saved"] == pytest.approx(-0.6)


def test_runs_that_were_read_alike_are_kept(script: ModuleType, tmp_path: Path) -> None:
    path, read = tmp_path / "lookups.json", {"use": "test", "max_tokens": 7}
    assert script.load_kept(None, read) == script.load_kept(path, read) == {}
    path.write_text(json.dumps(read | {"runs": {"a": 1}}))
    assert script.load_kept(path, read) == {"a": 1}
    assert script.load_kept(path, read | {"max_tokens": 8}) == {}
