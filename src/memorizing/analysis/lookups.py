"""Where memory helped with a name, whether it looked at the line that defines it.

The paper's Table 8, counted over all such tokens, beside what a look-up by exact match and chance
would find.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from memorizing.analysis.definitions import WORD
from memorizing.analysis.inspection import MARKED, Inspection
from memorizing.metrics import bootstrap_ratio


@dataclass(frozen=True)
class Rate:
    """How often something was right, with a 95% interval that draws names, and texts."""

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
    """A name counts once in each text."""
    rates: tuple[Rate, ...]
    """The memory's heaviest place, the newest exact match of the token before, chance."""


@dataclass(frozen=True)
class Use:
    """A helped token of a name whose definition could be retrieved."""

    name: str
    is_lemma: bool
    memory: bool
    """Whether the place that all heads together weighed most is in a line that defines the name."""
    match: bool
    """Whether the newest place is, that follows what precedes the token."""
    chance: float
    """The share of all places that are."""


def find_uses(found: Inspection) -> list[Use]:
    """Tokens of names that memory made at least twice as likely, away from their definitions.

    Only those whose definition could be retrieved when they were read.
    """
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
                Use(
                    word[0],
                    known[0][2],
                    any(low <= places[token] < high for low, high in held),
                    any(low <= match < high for low, high in held),
                    num_held / (end - start + num_others),
                )
            )
    return uses


def rate_lookups(texts: Sequence[Sequence[Use]]) -> list[Lookups]:
    """How often the line was looked at, of lemmas and of everything else that is defined.

    Args:
        texts: the uses of each text. Intervals draw texts, and names in each; of one text, names.
    """
    results = []
    for is_lemma, what in ((False, "definitions"), (True, "lemmas")):
        chosen = [[use for use in uses if use.is_lemma == is_lemma] for uses in texts]
        chosen = [uses for uses in chosen if uses]
        if not chosen:
            continue
        rates = [
            _make_rate(chosen, label, right)
            for label, right in (
                ("the memory's heaviest place", lambda use: float(use.memory)),
                ("newest exact match of the token before", lambda use: float(use.match)),
                ("any entry, by chance", lambda use: use.chance),
            )
        ]
        num_names = sum(len({use.name for use in uses}) for uses in chosen)
        results.append(Lookups(what, sum(map(len, chosen)), num_names, tuple(rates)))
    return results


def _make_rate(texts: Sequence[Sequence[Use]], label: str, right: Callable[[Use], float]) -> Rate:
    sums, counts, num_names = [], [], []
    for uses in texts:
        by_name: dict[str, list[float]] = {}
        for use in sorted(uses, key=lambda use: use.name):
            by_name.setdefault(use.name, []).append(right(use))
        sums += [sum(values) for values in by_name.values()]
        counts += [len(values) for values in by_name.values()]
        num_names.append(len(by_name))
    low, high = bootstrap_ratio(np.array(sums), np.array(counts), num_names)
    return Rate(label, sum(sums) / sum(counts), max(0.0, low), min(1.0, high))
