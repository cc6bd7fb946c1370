"""A text that a model has read, with and without memory, and what can be counted of it.

Shapes: n tokens of the text.
"""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from memorizing.analysis.definitions import WORD, Definition, find_definitions
from memorizing.analysis.token_classes import (
    CLASSES,
    classify_tokens,
    count_earlier,
    name_times,
)
from memorizing.analysis.traces import DISTANCE_EDGES, Trace
from memorizing.metrics import Totals, bootstrap_ratio

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
    share: float
    """Of all nats that memory saved in the text."""
    nats: float
    """A token, with memory."""
    baseline_nats: float


@dataclass(frozen=True)
class Rate:
    """How often something was right, with a 95% interval that draws names."""

    name: str
    rate: float
    low: float
    high: float


@dataclass(frozen=True)
class Lookups:
    """Where memory helped with a name, how often it looked at the line that defines it."""

    what: str
    num_tokens: int
    num_names: int
    rates: tuple[Rate, ...]
    """The memory's heaviest place, the newest exact match of the token before, chance."""


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
            share = gain / total if total else 0.0
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

    def count_lookups(self) -> list[Lookups]:
        """See `Lookups`; of lemmas and of everything else that is defined."""
        found = _find_uses(self)
        results = []
        for is_lemma, what in ((False, "definitions"), (True, "lemmas")):
            uses = [use for use in found if use.is_lemma == is_lemma]
            names = sorted({use.name for use in uses})
            if not uses:
                continue
            rates = [
                _make_rate(uses, names, label, right)
                for label, right in (
                    ("the memory's heaviest place", lambda use: float(use.memory)),
                    ("newest exact match of the token before", lambda use: float(use.match)),
                    ("any entry, by chance", lambda use: use.chance),
                )
            ]
            results.append(Lookups(what, len(uses), len(names), tuple(rates)))
        return results


_READ_BEFORE = "in what was read before"
_NOTHING = "nothing retrieved"


def name_distances() -> list[str]:
    """Classes of distances in tokens."""
    bounds = itertools.pairwise([0, *DISTANCE_EDGES])
    return [
        *(f"{low:,} to {high - 1:,}" for low, high in bounds),
        f"{DISTANCE_EDGES[-1]:,} or more",
    ]


@dataclass(frozen=True)
class _Use:
    """A helped token of a name whose definition could be retrieved."""

    name: str
    is_lemma: bool
    memory: bool
    match: bool
    chance: float


def _make_rate(
    uses: Sequence[_Use], names: Sequence[str], label: str, right: Callable[[_Use], float]
) -> Rate:
    sums, counts = np.zeros(len(names)), np.zeros(len(names))
    numbers = {name: number for number, name in enumerate(names)}
    for use in uses:
        sums[numbers[use.name]] += right(use)
        counts[numbers[use.name]] += 1
    low, high = bootstrap_ratio(sums, counts, [len(names)])
    return Rate(label, float(sums.sum() / counts.sum()), max(0.0, low), min(1.0, high))


def _find_uses(found: Inspection) -> list[_Use]:
    text, trace = found.text, found.trace
    assert text.text is not None
    lines: dict[str, list[tuple[int, int, bool]]] = defaultdict(list)
    others: dict[int, int] = {}
    num_others = 0
    for source in found.sources:
        for one in source.definitions:
            lines[one.name].append((*source.find_places(one.start, one.end), one.is_lemma))
        if source is not text:
            num_others += source.num_tokens
            others |= {int(token): source.first + i + 1 for i, token in enumerate(source.tokens)}
    places, _ = found.pooled
    own: dict[int, int] = {}
    uses, begun = [], 0
    for word in WORD.finditer(text.text):
        known = lines.get(word[0], ())
        first, last = text.find_places(*word.span())
        if not known or any(low <= first < high for low, high, _ in known):
            continue
        for token in range(first, min(last, trace.num_tokens)):
            if found.gains[token] < MARKED or places[token] < 0 or token < 1:
                continue
            end = token // found.segment_len * found.segment_len
            start = max(0, end - found.capacity)
            for place in range(max(begun, 1), end):
                own[int(text.tokens[place - 1])] = place
            begun = max(begun, end)
            held = [
                (max(low, start), min(high, end)) if low < text.num_tokens else (low, high)
                for low, high, _ in known
            ]
            held = [(low, high) for low, high in held if low < high]
            if not held:
                continue
            before = int(text.tokens[token - 1])
            match = own.get(before, -1)
            match = match if match >= start else others.get(before, -1)
            num_held = sum(high - low for low, high in held)
            uses.append(
                _Use(
                    word[0],
                    known[0][2],
                    any(low <= places[token] < high for low, high in held),
                    any(low <= match < high for low, high in held),
                    num_held / (end - start + num_others),
                )
            )
    return uses
