"""What tests of an open memory share."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(params=["folder", "none"])
def path(request: pytest.FixtureRequest, tmp_path: Path) -> Path | None:
    """Of a memory that is kept in a folder, or of one that is not kept."""
    return tmp_path / "some.memory" if request.param == "folder" else None
