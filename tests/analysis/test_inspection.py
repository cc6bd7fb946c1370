"""What is counted of a text that was inspected."""

import numpy as np
import pytest

from memorizing.analysis.inspection import Inspection, Source
from memorizing.analysis.traces import Trace


def inspect(*gains):
    """A text of as many tokens, each a character."""
    n = len(gains)
    nats = np.full(n, 3, np.float32)
    source = Source("text", n, 0, "ab" * n, np.arange(n), np.arange(1, n + 1))
    baseline = nats + np.array(gains, np.float32)
    return Inspection("m", "with", "without", (source,), Trace(nats), baseline, 5, 97, None)


def test_shares_are_of_what_memory_saved():
    rows = inspect(3, -1, 2, 0).count_by(["a", "b", "a", "b"], ["a", "b", "c"])
    assert [(row.name, row.tokens, row.gain) for row in rows] == [("a", 2, 2.5), ("b", 2, -0.5)]
    assert [row.share for row in rows] == pytest.approx([1.25, -0.25])


@pytest.mark.parametrize("gains", [(1, -2, 0), (0, 0, 0)])
def test_where_memory_saved_nothing_there_are_no_shares_of_it(gains):
    # What it saved in some would be a negative share of what it cost.
    rows = inspect(*gains).count_by(["a", "b", "b"], ["a", "b"])
    assert [row.share for row in rows] == [None, None]
