"""A text that a model has read, with and without memory, and what can be counted of it.

Shapes: n tokens of the text.
"""

from __future__ import annotations

import bisect
import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from memorizing.analysis.definitions import Definition, find_definitions
from memorizing.analysis.token_classes import (
    CLASSES,
    classify_tokens,
    count_earlier,
    name_times,
)
from memorizing.analysis.traces import DISTANCE_EDGES, Trace
from memorizing.metrics import Totals

MARKED = math.log(2)
"""Nats: tokens that memory makes at least twice as likely are counted as helped."""


@dataclass(frozen=True)
class Source:
    """A text that entries or passages are of: the one that was inspected, or a document.

    Its places are numbered from `first` on: token i has `first + i`, and its end
    `first + num_tokens`.
    """

    name: str
    num_tokens: int
    first: int
    text: str | None = None
    """None where it was not kept."""
    tokens: NDArray[np.integer[Any]] = field(default_factory=lambda: np.zeros(0, np.int64))
    """(num_tokens,) ids, where there is a text."""
    ends: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))
    """(num_tokens,) where the characters of each token end."""

    @cached_property
    def definitions(self) -> list[Definition]:
        """What its text defines."""
        return [] if self.text is None else find_definitions(self.text)

    def find_places(self, start: int, end: int) -> tuple[int, int]:
        """Places [from, to) of the tokens that characters [start, end) are in."""
        first, last = np.searchsorted(self.ends, [start, end - 1], side="right").tolist()
        return self.first + first, self.first + min(last + 1, self.num_tokens)


@dataclass(frozen=True)
class Row:
    """Some of the tokens, and what memory changed for them."""

    name: str
    tokens: int
    gain: float
    """Nats a token that memory saved."""
    share: float | None
    """Of all nats that memory saved in the text; None where it cost more than it saved."""
    nats: float
    """A token, with memory."""
    baseline_nats: float


@dataclass(frozen=True)
class Seen:
    """Passages that the tokens from one on had in sight, until the next."""

    first: int
    passages: tuple[tuple[int, int, float], ...]
    """Best one first: place, tokens, share of the attention that finds."""


@dataclass(frozen=True)
class Inspection:
    """What a model made of a text, with its memory and with less."""

    model: str
    memory: str
    """With what memory; its name on the page."""
    baseline: str
    """What it is compared with."""
    sources: tuple[Source, ...]
    """The text first; its places are its tokens. Then what else was retrieved from."""
    trace: Trace
    """Places are those of the sources."""
    baseline_nats: NDArray[np.float32]
    segment_len: int
    capacity: int
    num_bytes: int | None
    """Of the text; None where it was read in part."""
    gates: tuple[tuple[int, dict[str, list[float]]], ...] = ()
    """Steps of the training, and per layer the gates of its heads then."""
    sights: tuple[Seen, ...] = ()
    """Passages in sight, where these are read; their places are those of the sources."""
    index: str = "exact"
    """What searched the memory."""
    recall: float | None = None
    """Of an approximate index, against exact search; None where the search is exact."""

    @property
    def text(self) -> Source:
        """The one that was inspected."""
        return self.sources[0]

    @cached_property
    def gains(self) -> NDArray[np.float32]:
        """(n,) nats that memory saved."""
        return self.baseline_nats - self.trace.nats

    @cached_property
    def pooled(self) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """See `Trace.pool`."""
        return self.trace.pool()

    def sum_nats(self, nats: NDArray[np.float32]) -> Totals:
        """Totals as `evaluate` has them."""
        return Totals(float(nats.sum(dtype=np.float64)), len(nats), self.num_bytes)

    def count_by(self, names: Sequence[str], order: Iterable[str]) -> list[Row]:
        """Rows of the tokens by name; names without a token are left out."""
        total = float(self.gains.sum(dtype=np.float64))
        held = np.array(names)
        rows = []
        for name in order:
            chosen = held == name
            count = int(chosen.sum())
            if not count:
                continue
            sums = (self.gains, self.trace.nats, self.baseline_nats)
            gain, nats, baseline = (float(part[chosen].sum(dtype=np.float64)) for part in sums)
            share = gain / total if total > 0 else None
            rows.append(Row(name, count, gain / count, share, nats / count, baseline / count))
        return rows

    def count_classes(self) -> list[Row]:
        """By what a token is part of."""
        assert self.text.text is not None
        defined = {one.name for one in self.text.definitions}
        return self.count_by(classify_tokens(self.text.text, self.text.ends, defined), CLASSES)

    def count_earlier(self) -> list[Row]:
        """By how often a token was there before."""
        earlier = count_earlier(self.text.tokens)
        order = dict.fromkeys(name_times(np.arange(int(earlier.max(initial=0)) + 1)))
        return self.count_by(name_times(earlier), order)

    def count_distances(self) -> list[Row]:
        """By how far before a token the place is that was retrieved with most weight."""
        places, _ = self.pooled
        names = name_distances()
        far = np.searchsorted(DISTANCE_EDGES, np.arange(len(places)) - places, side="right")
        found = np.array(names)[far]
        found = np.where(places > self.trace.num_tokens, _READ_BEFORE, found)
        found = np.where(places < 0, _NOTHING, found)
        return self.count_by(found.tolist(), [_NOTHING, *names, _READ_BEFORE])

    def count_passages(self) -> list[Row]:
        """By the text that the best passage in sight is of, most tokens first."""
        firsts = [source.first for source in self.sources]
        found = np.full(self.trace.num_tokens, -1)
        for sight in self.sights:
            found[sight.first :] = bisect.bisect_right(firsts, sight.passages[0][0]) - 1
        counts = np.bincount(found + 1, minlength=len(firsts) + 1)[1:]
        shown = np.argsort(-counts, kind="stable")[:_MOST_SHOWN].tolist()
        # Documents may be called anything, also alike.
        names = {number: f"{number}" for number in shown}
        rows = self.count_by(
            [_NO_PASSAGE if n < 0 else names.get(n, _OTHERS) for n in found.tolist()],
            [*names.values(), _OTHERS, _NO_PASSAGE],
        )
        titles = {"0": _THIS_TEXT} | {f"{n}": self.sources[n].name for n in shown if n}
        return [replace(row, name=titles.get(row.name, row.name)) for row in rows]


_READ_BEFORE = "in what was read before"
_NOTHING = "nothing retrieved"
_NO_PASSAGE = "no passage in sight"
_THIS_TEXT = "this text"
_OTHERS = "other documents"
_MOST_SHOWN = 12
"""Documents with a line of their own."""


def name_distances() -> list[str]:
    """Classes of distances in tokens."""
    bounds = itertools.pairwise([0, *DISTANCE_EDGES])
    return [
        *(f"{low:,} to {high - 1:,}" for low, high in bounds),
        f"{DISTANCE_EDGES[-1]:,} or more",
    ]
