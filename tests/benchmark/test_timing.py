"""Functions take turns, and are compared turn by turn."""

import time

import pytest

from memorizing.benchmark.timing import Timings, time_interleaved


def test_functions_take_turns_and_every_second_turn_runs_backwards() -> None:
    calls: list[str] = []
    functions = {name: lambda name=name: calls.append(name) for name in "abc"}
    progress: list[tuple[int, int]] = []
    timings = time_interleaved(
        functions,
        num_pairs=3,
        num_warmup=2,
        between=lambda: calls.append("."),
        on_progress=lambda done, total: progress.append((done, total)),
    )
    assert "".join(calls) == "a.b.c." + "c.b.a." + "a.b.c." + "c.b.a." + "a.b.c."
    assert progress == [(n, 5) for n in range(1, 6)]
    assert {name: list(times) for name, times in timings.seconds.items()} == {
        name: [0, 1, 2] for name in "abc"
    }


def test_a_slow_function_warms_up_once_and_takes_part_in_fewer_turns(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    counts = {"fast": 0, "slow": 0}
    # A clock that only these functions move: a busy machine must not make the fast one slow.
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])

    def run_fast() -> None:
        counts["fast"] += 1
        now[0] += 1.0

    def run_slow() -> None:
        counts["slow"] += 1
        now[0] += 20.5

    timings = time_interleaved(
        {"fast": run_fast, "slow": run_slow}, num_pairs=7, num_warmup=3, num_slow_pairs=2
    )
    assert counts == {"fast": 3 + 7, "slow": 1 + 2}
    assert list(timings.seconds["slow"]) == [0, 3]
    assert timings.compare("slow", "fast")["num_pairs"] == 2
    assert timings.compare("fast", "fast")["num_pairs"] == 7


def test_a_ratio_is_the_median_over_pairs_not_the_ratio_of_medians() -> None:
    # The machine is ten times slower in turn 1; "b" missed turn 3.
    timings = Timings({"a": {0: 1.0, 1: 10.0, 2: 2.0, 3: 7.0}, "b": {0: 2.0, 1: 20.0, 2: 6.0}})
    row = timings.compare("b", "a")
    assert (row["name"], row["compared_with"], row["num_pairs"]) == ("b", "a", 3)
    assert (row["ratio"], row["added_s"], row["seconds"]) == (2.0, 4.0, 6.0)
    assert timings.compare("a", "b")["ratio"] == pytest.approx(0.5)
    assert timings.compute_median("a") == 4.5
