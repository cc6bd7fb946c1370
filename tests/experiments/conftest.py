"""Scripts of `experiments/` are found as they are when one runs them: beside one another."""

from pathlib import Path

import pytest

CORPORA = Path(__file__).parents[2] / "experiments" / "corpora"


@pytest.fixture(autouse=True)
def _scripts_are_found(monkeypatch):
    monkeypatch.syspath_prepend(str(CORPORA))
