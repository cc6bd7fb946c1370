"""What tests of memory folders share."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.memory.disk.examples import make_folder


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Of a memory with three documents."""
    make_folder(tmp_path / "memory", ["a", "b"], ["c"])
    return tmp_path / "memory"
