"""Settings of the process that runs the tests."""

import gc
import os
import shutil
from collections.abc import Iterator
from importlib.metadata import version

import pytest
from packaging.version import Version

# Before torch is imported. Calls as small as those of the tests are slower in several threads, and
# two processes run tests; where threads matter, a test sets their number.
os.environ["OMP_NUM_THREADS"] = "1"
# As the command line does: threads that spin while they wait starve one another.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

# Files are synced tens of thousands of times, and a disk takes milliseconds for each. Tests write
# about 100 MiB.
_IN_MEMORY, _ROOM = "/dev/shm", 2**31
if os.access(_IN_MEMORY, os.W_OK) and shutil.disk_usage(_IN_MEMORY).free > _ROOM:
    os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", _IN_MEMORY)


def pytest_collection_finish() -> None:
    """Do not look through what was imported for what can be freed, and seldom through the rest."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 100)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    """A release of transformers that refuses the tested peft is tested without LoRA."""
    from memorizing.errors import IndexUnavailableError

    try:
        return (yield)
    except IndexUnavailableError:
        from transformers.integrations.peft import MIN_PEFT_VERSION

        if Version(version("peft")) >= Version(MIN_PEFT_VERSION):
            raise
    pytest.skip(f"this transformers works with peft {MIN_PEFT_VERSION} or newer")
