"""The peak of a step is measured in processes of its own."""

from __future__ import annotations

import pytest

from memorizing.benchmark.step import benchmark_step
from tests.benchmark.test_step import TINY


def test_peak_memory_is_that_of_other_processes_less_their_entries() -> None:
    result = benchmark_step(TINY, (65_537,), num_pairs=1, num_peaks=1, large_dim=31)
    without, full = result["rows"]
    assert (without["entries_mib"], without["beyond_entries_mib"]) == (0, 0)
    # Keys and values of 2 heads and 5 dimensions in bf16.
    assert full["entries_mib"] == 2 * 65_537 * 2 * 5 * 2 / 2**20
    expected = full["peak_mib"] - without["peak_mib"] - full["entries_mib"]
    assert full["beyond_entries_mib"] == pytest.approx(expected)
    assert full["peak_mib"] > without["peak_mib"] > full["entries_mib"]
    assert full["peak_method"] in ("VmHWM", "ru_maxrss")
