"""Times of several functions, interleaved, compared pair by pair.

A machine's speed changes from second to second (other load, clock, temperature). So the functions
take turns, and what is reported is the median of the ratios of times measured in the same turn,
not the ratio of times measured apart.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

SLOW_FACTOR = 20.0
"""A function that takes this many times as long as the first one counts as slow."""


@dataclass(frozen=True)
class Timings:
    """Seconds of every function in every turn that it took part in."""

    seconds: Mapping[str, Mapping[int, float]]
    """Name, then turn, counted from 0."""

    def list_pairs(self, name: str, base: str) -> list[tuple[float, float]]:
        """Seconds of both, of the turns that both took part in."""
        own, others = self.seconds[name], self.seconds[base]
        return [(own[turn], others[turn]) for turn in own if turn in others]

    def compute_median(self, name: str) -> float:
        """Median seconds of a function."""
        return statistics.median(self.seconds[name].values())

    def compare(self, name: str, base: str) -> dict[str, Any]:
        """A row of a report: one function against another.

        Returns:
            `name`; `seconds` (median); `compared_with`; `ratio` (median of the pairwise ratios of
            seconds); `added_s` (median of the pairwise differences); `num_pairs`.
        """
        pairs = self.list_pairs(name, base)
        return {
            "name": name,
            "seconds": self.compute_median(name),
            "compared_with": base,
            "ratio": statistics.median(own / other for own, other in pairs),
            "added_s": statistics.median(own - other for own, other in pairs),
            "num_pairs": len(pairs),
        }


def time_interleaved(
    functions: Mapping[str, Callable[[], object]],
    num_pairs: int = 20,
    num_warmup: int = 3,
    *,
    num_slow_pairs: int | None = None,
    between: Callable[[], object] | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> Timings:
    """Call the functions in turns and time every call.

    Every second turn goes through them backwards, so that none always follows the same one.

    Args:
        functions: by name. The first is what slowness is measured against.
        num_pairs: turns that are timed, 1 or more.
        num_warmup: turns before, which are not; 1 or more where `num_slow_pairs` is given.
        num_slow_pairs: turns, spread evenly, that slow functions take part in: those that took more
            than `SLOW_FACTOR` times as long as the first one while warming up. None is all.
        between: called after every call, not timed (to clear gradients, or to wait until the
            threads of another library are asleep).
        on_progress: called with turns done and in all.
    """
    slow_turns = set(range(num_pairs))
    if num_slow_pairs is not None and num_slow_pairs < num_pairs:
        slow_turns = {turn * num_pairs // num_slow_pairs for turn in range(num_slow_pairs)}
    names = list(functions)
    seconds: dict[str, dict[int, float]] = {name: {} for name in functions}
    latest: dict[str, float] = {}

    def is_slow(name: str) -> bool:
        return name in latest and latest[name] > SLOW_FACTOR * latest[names[0]]

    slow: set[str] = set()
    for turn in range(-num_warmup, num_pairs):
        for name in names if turn % 2 == 0 else names[::-1]:
            if name in slow and turn not in slow_turns:
                continue
            start = time.perf_counter()
            functions[name]()
            latest[name] = time.perf_counter() - start
            if turn >= 0:
                seconds[name][turn] = latest[name]
            if between is not None:
                between()
        if turn < 0 and num_slow_pairs is not None:
            slow = set(filter(is_slow, names))  # a slow function warms up only once
        if on_progress is not None:
            on_progress(num_warmup + turn + 1, num_warmup + num_pairs)
    return Timings(seconds)
