"""What tests of the server share."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from experiments.faults.tiny import save_llama
from tests.serving.tools import NOTES, Served, serve, write_memory


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_llama(tmp_path_factory.mktemp("served") / "llama")


@pytest.fixture(scope="session")
def notes(model_folder: Path) -> Path:
    """A memory that is not to be changed."""
    return write_memory(model_folder, model_folder.parent / "notes.memory", NOTES)


@pytest.fixture(scope="session")
def served(model_folder: Path, notes: Path) -> Iterator[Served]:
    """A server that tests share: they change nothing of it."""
    with serve(model_folder, {"notes": notes}) as running:
        yield running
