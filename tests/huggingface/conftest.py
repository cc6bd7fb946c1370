"""What tests of an open memory share."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import pytest
from packaging.version import Version
from transformers.integrations.peft import MIN_PEFT_VERSION

from memorizing.errors import IndexUnavailableError


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    """A release of transformers that refuses the tested peft is tested without LoRA."""
    try:
        return (yield)
    except IndexUnavailableError:
        if Version(version("peft")) >= Version(MIN_PEFT_VERSION):
            raise
    pytest.skip(f"this transformers works with peft {MIN_PEFT_VERSION} or newer")


@pytest.fixture(params=["folder", "none"])
def path(request: pytest.FixtureRequest, tmp_path: Path) -> Path | None:
    """Of a memory that is kept in a folder, or of one that is not kept."""
    return tmp_path / "some.memory" if request.param == "folder" else None
