"""Modules of a folder of `experiments/`, which a script finds beside it."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType, SimpleNamespace

EXPERIMENTS = Path(__file__).parents[2] / "experiments"


@contextmanager
def open_scripts(folder: Path, names: Sequence[str]) -> Iterator[SimpleNamespace]:
    """Inside, modules of a folder by their last names, and its `__main__`, if any, as `main`."""
    with _find_scripts(folder):
        modules = {name.rpartition(".")[2]: importlib.import_module(name) for name in names}
        if (path := folder / "__main__.py").is_file():
            main = importlib.util.spec_from_file_location(f"{folder.name}_main", path)
            assert main is not None
            assert main.loader is not None
            modules["main"] = importlib.util.module_from_spec(main)
            main.loader.exec_module(modules["main"])
        yield SimpleNamespace(**modules)


@contextmanager
def open_script(name: str, folder: Path = EXPERIMENTS) -> Iterator[ModuleType]:
    """Inside, a script of a folder as a module."""
    with _find_scripts(folder):
        yield importlib.import_module(name)


@contextmanager
def _find_scripts(folder: Path) -> Iterator[None]:
    """Inside, modules of a folder are found; afterwards those that were loaded are forgotten."""
    before = set(sys.modules)
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        sys.path.remove(str(folder))
        for name in set(sys.modules) - before:
            if (getattr(sys.modules[name], "__file__", None) or "").startswith(str(folder)):
                del sys.modules[name]
