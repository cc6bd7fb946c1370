"""Scripts of `experiments/` are found as they are when one runs them: beside one another."""

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.experiments.pair_of_runs import train_pair
from tests.experiments.scripts import EXPERIMENTS, open_scripts

CORPORA = EXPERIMENTS / "corpora"


@pytest.fixture(autouse=True)
def _scripts_are_found(monkeypatch):
    monkeypatch.syspath_prepend(str(CORPORA))


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with memory and one without."""
    return train_pair(tmp_path_factory.mktemp("pair"))


@pytest.fixture(scope="module")
def report() -> Iterator[SimpleNamespace]:
    """The modules of the report, which a script finds beside it."""
    names = ["results", "comparing", "paper", "formatting", "pictures", "sections"]
    parts = (
        "ablations",
        "amounts",
        "beyond",
        "families",
        "finetuning",
        "learning",
        "scale",
        "table4",
    )
    with open_scripts(
        EXPERIMENTS / "report", [*names, *(f"sections.{part}" for part in parts)]
    ) as found:
        yield found
