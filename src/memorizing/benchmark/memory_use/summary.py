"""What came of all places, per arm: means with intervals, and differences to the passages."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from memorizing.benchmark.memory_use.arms import ARMS
from memorizing.benchmark.memory_use.asking import Asked
from memorizing.benchmark.memory_use.completion import count_names, is_exact, measure_similarity
from memorizing.metrics import bootstrap_ratio

BASE = "passages"
"""What the others are compared with."""
RANKS = (1, 2, 4, 8)
_NUM_RESAMPLES = 2_000

Ratios = dict[str, tuple[float, float]]
"""By name of a number, numerator and denominator of one place."""


def measure_quote(asked: Asked) -> Ratios:
    """How well a text was quoted."""
    return {
        "right": (asked.num_right, 1),
        "whole": (asked.num_right == asked.num_tokens, 1),
        "nats": (asked.nats, asked.num_tokens),
    }


def measure_call(asked: Asked, answer: str) -> Ratios:
    """How right the arguments of a call are."""
    written = asked.written or ""
    return {
        "exact": (is_exact(written, answer), 1),
        "similarity": (measure_similarity(written, answer), 1),
        "names": count_names(written, answer),
        "nats": (asked.nats, asked.num_tokens),
    }


@dataclass(frozen=True)
class Estimate:
    """A number and the ends of its 95% interval; without ends of fewer than two places."""

    value: float
    low: float | None
    high: float | None

    @property
    def excludes_zero(self) -> bool:
        """Whether the interval lies on one side of zero."""
        return self.low is not None and self.high is not None and self.low * self.high > 0


def estimate(
    numerators: Sequence[float], denominators: Sequence[float], groups: Sequence[str]
) -> Estimate | None:
    """sum(numerators) / sum(denominators), groups and the places in them drawn again.

    Args:
        numerators: of each place.
        denominators: of each place; places without one are left out.
        groups: file or package of each place.

    Returns:
        None where nothing is left.
    """
    order: list[int] = np.argsort(np.array(groups), kind="stable").tolist()
    kept = [n for n in order if denominators[n] > 0]
    if not kept:
        return None
    above, below = (_pick(values, kept) for values in (numerators, denominators))
    counts = [sum(groups[n] == group for n in kept) for group in sorted({groups[n] for n in kept})]
    low, high = bootstrap_ratio(above, below, counts, num_resamples=_NUM_RESAMPLES)
    ends = (low, high) if math.isfinite(low) else (None, None)
    return Estimate(float(above.sum() / below.sum()), *ends)


def _pick(values: Sequence[float], kept: Sequence[int]) -> NDArray[np.float64]:
    return np.array([values[n] for n in kept], dtype=np.float64)


def summarize(
    asked: Mapping[str, Sequence[Asked]],
    ratios: Mapping[str, Sequence[Ratios]],
    groups: Sequence[str],
    num_bytes: Mapping[str, int],
) -> list[dict[str, Any]]:
    """A row for every arm.

    Args:
        asked: per arm, what came of its places.
        ratios: per arm, the numbers of these places.
        groups: file or package of every place.
        num_bytes: per arm, what it stores.
    """
    return [
        {
            "name": name,
            "label": ARMS[name].label,
            "is_ranked": ARMS[name].is_ranked,
            "num_places": len(found),
            "quality": _estimate_all(found, ratios[name], groups),
            "minus_passages": _compare(name, asked, ratios, groups),
            "found": _count_found(found),
            "tokens_given": statistics.fmean(one.num_given for one in found),
            "bytes": num_bytes[name],
            "first_token_s": statistics.median(one.first_s for one in found),
            "token_s": _median([one.token_s for one in found if one.token_s is not None]),
        }
        for name, found in asked.items()
        if found
    ]


def _estimate_all(
    found: Sequence[Asked], ratios: Sequence[Ratios], groups: Sequence[str]
) -> dict[str, dict[str, Any] | None]:
    mine = [groups[one.place] for one in found]
    result = {}
    for key in ratios[0]:
        above, below = zip(*(one[key] for one in ratios), strict=True)
        result[key] = _dump(estimate(above, below, mine))
    return result


def _compare(
    name: str,
    asked: Mapping[str, Sequence[Asked]],
    ratios: Mapping[str, Sequence[Ratios]],
    groups: Sequence[str],
) -> dict[str, dict[str, Any] | None] | None:
    """Differences at the places that both arms were asked at."""
    if name == BASE or not asked.get(BASE):
        return None
    base = {one.place: found for one, found in zip(asked[BASE], ratios[BASE], strict=True)}
    mine = {one.place: found for one, found in zip(asked[name], ratios[name], strict=True)}
    both = [place for place in mine if place in base]
    result = {}
    for key in ratios[name][0]:
        differences = [mine[place][key][0] - base[place][key][0] for place in both]
        below = [mine[place][key][1] for place in both]
        result[key] = _dump(estimate(differences, below, [groups[place] for place in both]))
    return result


def _count_found(found: Sequence[Asked]) -> dict[str, Any] | None:
    """Shares of prompts whose right place is among the best passages."""
    ranks = [one.rank for one in found if one.rank is not None]
    if not ranks:
        return None
    scores = [one.score for one in found if one.score is not None]
    return {
        "among": {
            str(most): sum(0 < rank <= most for rank in ranks) / len(ranks) for most in RANKS
        },
        "in_sight": statistics.fmean(bool(one.is_in_sight) for one in found),
        "score": _median(scores),
    }


def _median(values: Sequence[float]) -> float | None:
    return statistics.median(values) if values else None


def _dump(found: Estimate | None) -> dict[str, Any] | None:
    if found is None:
        return None
    return {
        "value": found.value,
        "interval": None if found.low is None else [found.low, found.high],
        "excludes_zero": found.excludes_zero,
    }
