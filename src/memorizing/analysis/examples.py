"""Tokens where memory helped, with their text and the text around what was retrieved for them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from memorizing.analysis.helped import HelpedToken
from memorizing.analysis.traces import Trace

if TYPE_CHECKING:
    from memorizing.data import TokenizedDocument, Tokenizer


@dataclass(frozen=True)
class Place:
    """A place in the document that was retrieved, with the text around it."""

    position: int
    """Of the heaviest entry: that of the document's token `position - 1`."""
    tokens_ago: int
    """How far before the predicting token."""
    share: float
    """Of the weight of everything retrieved for this token, entries nearby included."""
    before: str
    entry: str
    """The token that was stored; empty for the start token."""
    after: str
    """What followed it."""


@dataclass(frozen=True)
class Example:
    """A token that is predicted better with memory."""

    document: str
    position: int
    before: str
    token: str
    after: str
    probability: float
    baseline_probability: float
    places: tuple[Place, ...]
    """What was retrieved: the heaviest first."""

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def explain_helped_tokens(
    traces: Mapping[int, Trace],
    documents: Sequence[TokenizedDocument],
    tokenizer: Tokenizer,
    helped: Sequence[HelpedToken],
    *,
    num_places: int = 2,
    context_tokens: int = 40,
    neighborhood: int = 8,
) -> list[Example]:
    """Show what was retrieved for some tokens.

    Args:
        traces: by the number of a document, as far as its last helped token.
        documents: those that `helped` was chosen from.
        tokenizer: of the documents.
        helped: the tokens, see `find_helped_tokens`.
        num_places: how many retrieved places to show.
        context_tokens: tokens shown before and after.
        neighborhood: entries nearer than this are one place.
    """
    examples = []
    for token in helped:
        document = documents[token.document]
        before, text, after = _quote(tokenizer, document.tokens, token.position, context_tokens)
        trace = traces[token.document]
        total = trace.gates[token.position].mean() if trace.heads else 0.0
        places = []
        entries = trace.list_weights(token.position)
        for position, weight in _merge_entries(entries, neighborhood)[:num_places]:
            quote = _quote(tokenizer, document.tokens, position - 1, context_tokens)
            places.append(Place(position, token.position - position, float(weight / total), *quote))
        examples.append(
            Example(
                document=document.name,
                position=token.position,
                before=before,
                token=text,
                after=after,
                probability=token.probability,
                baseline_probability=token.baseline_probability,
                places=tuple(places),
            )
        )
    return examples


def _merge_entries(
    entries: Iterable[tuple[int, float]], neighborhood: int
) -> list[tuple[int, float]]:
    """Places and weights, the heaviest first: layers together, entries with their neighbors."""
    by_position: dict[int, float] = {}
    for position, weight in entries:
        by_position[position] = by_position.get(position, 0.0) + weight
    places: dict[int, float] = {}
    for position, weight in sorted(by_position.items(), key=lambda item: (-item[1], -item[0])):
        near = (place for place in places if abs(place - position) < neighborhood)
        place = min(near, key=lambda p: abs(p - position), default=position)
        places[place] = places.get(place, 0.0) + weight
    return sorted(places.items(), key=lambda item: (-item[1], -item[0]))


def _quote(
    tokenizer: Tokenizer, tokens: np.ndarray, index: int, context_tokens: int
) -> tuple[str, str, str]:
    """Text before token `index`, of it, and after it; -1 is the start token, which has none."""
    first = max(index - context_tokens, 0)
    last = index + 1 + context_tokens
    bounds = (first, max(index, 0), index + 1, last)
    # A token alone may decode differently than after others, so texts are differences of prefixes.
    prefixes = [tokenizer.decode(tokens[first:bound]) for bound in bounds]
    parts = []
    for start, end, short, long in zip(bounds, bounds[1:], prefixes, prefixes[1:], strict=False):
        is_prefix = long.startswith(short)
        parts.append(long[len(short) :] if is_prefix else tokenizer.decode(tokens[start:end]))
    return parts[0], parts[1], parts[2]
