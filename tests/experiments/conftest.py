"""Scripts of `experiments/` are found as they are when one runs them: beside one another."""

import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

REPORT = Path(__file__).parents[2] / "experiments" / "report"
CORPORA = Path(__file__).parents[2] / "experiments" / "corpora"


@pytest.fixture(autouse=True)
def _scripts_are_found(monkeypatch):
    monkeypatch.syspath_prepend(str(CORPORA))


@pytest.fixture(scope="module")
def report() -> Iterator[SimpleNamespace]:
    """The modules of the report, which a script finds beside it."""
    before = set(sys.modules)
    sys.path.insert(0, str(REPORT))
    try:
        names = ("results", "comparing", "paper", "formatting", "pictures", "sections")
        modules = {name: importlib.import_module(name) for name in names}
        parts = ("ablations", "beyond", "families", "finetuning", "learning", "scale", "table4")
        modules |= {name: importlib.import_module(f"sections.{name}") for name in parts}
        main = importlib.util.spec_from_file_location("report_main", REPORT / "__main__.py")
        assert main is not None
        assert main.loader is not None
        modules["main"] = importlib.util.module_from_spec(main)
        main.loader.exec_module(modules["main"])
        yield SimpleNamespace(**modules)
    finally:
        sys.path.remove(str(REPORT))
        for name in set(sys.modules) - before:
            if (getattr(sys.modules[name], "__file__", None) or "").startswith(str(REPORT)):
                del sys.modules[name]
