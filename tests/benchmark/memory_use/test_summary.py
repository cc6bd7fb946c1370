"""Means, intervals and differences of what was asked."""

from __future__ import annotations

import numpy as np
import pytest

from memorizing.benchmark.memory_use.asking import Asked
from memorizing.benchmark.memory_use.summary import (
    Estimate,
    estimate,
    measure_call,
    measure_quote,
    summarize,
)

GROUPS = ["a", "b", "a", "b"]


def make_asked(place: int, num_right: int = 0, nats: float = 1.0, **changes) -> Asked:
    values = {
        "num_tokens": 4,
        "num_given": 10,
        "first_s": 0.5,
        "rank": None,
        "score": None,
        "is_in_sight": None,
        "found": (),
        "token_s": None,
    }
    return Asked(place=place, num_right=num_right, nats=nats, **values | changes)


def summarize_quotes(arms: dict[str, list[Asked]], groups=GROUPS):
    ratios = {name: [measure_quote(one) for one in found] for name, found in arms.items()}
    return summarize(arms, ratios, groups, dict.fromkeys(arms, 7))


def test_an_interval_is_that_of_drawing_files_again():
    generator = np.random.default_rng(0)
    values = generator.normal(3.0, 1.0, size=61)
    found = estimate(values.tolist(), [1] * 61, [f"{n:02}" for n in range(61)])
    draws = generator.integers(61, size=(20_000, 61))
    low, high = np.quantile(values[draws].mean(1), (0.025, 0.975))
    assert found.value == pytest.approx(values.mean())
    assert (found.low, found.high) == (pytest.approx(low, abs=0.04), pytest.approx(high, abs=0.04))


def test_places_of_one_file_are_drawn_together():
    # Alike within a file: as many files as there are say how sure a mean is, not as many places.
    files = np.arange(7).repeat(13)
    together = estimate(files.tolist(), [1] * 91, [str(n) for n in files])
    apart = estimate(files.tolist(), [1] * 91, [str(n) for n in range(91)])
    assert together.high - together.low > 2 * (apart.high - apart.low)


def test_a_mean_is_of_sums_and_places_without_anything_to_count_are_left_out():
    found = estimate([1, 0, 3, 5], [2, 0, 4, 6], GROUPS)
    assert found.value == 9 / 12
    assert estimate([0, 0], [0, 0], ["a", "b"]) is None
    assert estimate([3], [4], ["a"]) == Estimate(0.75, None, None)
    assert not estimate([3], [4], ["a"]).excludes_zero


@pytest.mark.parametrize(
    ("low", "high", "expected"), [(0.1, 2, True), (-2, -0.1, True), (-1, 1, False), (0, 1, False)]
)
def test_an_interval_on_one_side_excludes_zero(low, high, expected):
    assert Estimate(0.5, low, high).excludes_zero is expected


def test_an_arm_that_equals_the_passages_differs_from_them_by_nothing():
    found = [make_asked(n, num_right=n, nats=n / 3) for n in range(4)]
    base, other = summarize_quotes({"passages": found, "bm25": list(found)})
    assert base["quality"] == other["quality"]
    assert base["minus_passages"] is None
    for difference in other["minus_passages"].values():
        assert difference == {"value": 0.0, "interval": [0.0, 0.0], "excludes_zero": False}


def test_differences_are_of_the_places_that_both_were_asked_at():
    passages = [make_asked(n, num_right=1) for n in range(4)]
    whole = [make_asked(2, num_right=4), make_asked(0, num_right=3)]
    row = summarize_quotes({"whole": whole, "passages": passages})[0]
    assert row["num_places"] == 2
    assert not row["is_ranked"]
    assert row["minus_passages"]["right"]["value"] == 2.5
    assert row["minus_passages"]["whole"]["value"] == 0.5


def test_a_row_has_its_costs_and_what_was_found():
    found = [
        make_asked(0, rank=1, score=0.5, is_in_sight=True, first_s=1.0, token_s=0.25),
        make_asked(1, rank=0, score=0.1, is_in_sight=False, first_s=3.0, num_given=20),
        make_asked(2, rank=8, score=0.3, is_in_sight=False, first_s=2.0, num_given=30),
        make_asked(3, rank=3, score=0.2, is_in_sight=True, first_s=9.0, num_given=40),
    ]
    (row,) = summarize_quotes({"passages": found})
    assert row["found"]["among"] == {"1": 0.25, "2": 0.25, "4": 0.5, "8": 0.75}
    assert row["found"]["in_sight"] == 0.5
    assert row["found"]["score"] == pytest.approx(0.25)
    assert (row["tokens_given"], row["first_token_s"], row["token_s"]) == (25, 2.5, 0.25)
    assert row["bytes"] == 7


def test_an_arm_that_was_not_begun_has_no_row():
    rows = summarize_quotes({"nothing": [make_asked(0)], "passages": []})
    assert [row["name"] for row in rows] == ["nothing"]
    assert rows[0]["minus_passages"] is None
    assert rows[0]["found"] is None


def test_a_quote_is_whole_where_all_of_it_is_right():
    assert measure_quote(make_asked(0, 4, nats=2.0)) == {
        "right": (4, 1),
        "whole": (True, 1),
        "nats": (2.0, 4),
    }
    assert measure_quote(make_asked(0, 3))["whole"] == (False, 1)


def test_a_call_is_measured_by_what_is_written():
    asked = make_asked(0, nats=3.0, written="x, z)")
    assert measure_call(asked, "x, yy)") == {
        "exact": (False, 1),
        "similarity": (pytest.approx(1 - 2 / 5), 1),
        "names": (1, 2),
        "nats": (3.0, 4),
    }
