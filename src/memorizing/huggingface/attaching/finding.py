"""Passages that are found together in what was read before and in the text itself.

What is searched may be divided, over several machines too: each part first tells the sums over its
chunks, of which one softmax over all is made, then its best spans, and of the best of all their
passages.

Shapes: T queries, F heads of queries that find, W words.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from torch import Tensor

from memorizing.huggingface.attaching.memory_settings import MemorySettings
from memorizing.huggingface.attaching.passage_room import (
    WORDS,
    Library,
    OwnText,
    Passage,
    Question,
    Searched,
    Totals,
    make_passage,
)
from memorizing.huggingface.attaching.passages import (
    LAST_WORDS,
    ChunkSums,
    Collection,
    Span,
    add_sums,
    choose_among,
    choose_in,
    count_words,
    list_words,
    match_words,
    rank_part,
    share_out,
    sum_chunks,
    total_sums,
    weigh_words,
)


@dataclass(frozen=True)
class Shelf:
    """Documents of this process: entries, and the tokens that they are of."""

    collection: Collection
    source: Library | OwnText | None
    """None has no documents."""

    @property
    def is_empty(self) -> bool:
        """See `Searched`."""
        return not self.collection.num_entries

    def ask(self, question: Question, settings: MemorySettings) -> ShelfSearch:
        """See `Searched`."""
        return ShelfSearch(self.collection, question, settings)

    def fetch(self, spans: Sequence[Span]) -> list[Passage | None]:
        """See `Searched`."""
        return [make_passage(span, self.collection, self.source) for span in spans]


@dataclass(frozen=True)
class TextShelf:
    """Stretches of documents of which only the tokens are known: words alone find them."""

    stretches: Sequence[Stretch]

    @cached_property
    def collection(self) -> Collection:
        """The tokens of all stretches, each as a document."""
        return Collection(
            tuple(len(one.ids) for one in self.stretches),
            {},
            lambda: torch.cat([one.ids for one in self.stretches]),
        )

    @property
    def is_empty(self) -> bool:
        """See `Searched`."""
        return not self.stretches

    def ask(self, question: Question, settings: MemorySettings) -> ShelfSearch:
        """See `Searched`."""
        return ShelfSearch(self.collection, question, settings)

    def fetch(self, spans: Sequence[Span]) -> list[Passage | None]:
        """See `Searched`."""
        return [self._make_passage(span) for span in spans]

    def _make_passage(self, span: Span) -> Passage:
        stretch = self.stretches[span.document]
        before = self.collection.first_entries[span.document]
        start, end, chunk = (place - before for place in (span.start, span.end, span.chunk))
        return Passage(
            document=stretch.document,
            start=stretch.start + start,
            end=stretch.start + end,
            score=span.score,
            chunk=stretch.start + chunk,
            is_at_end=end == len(stretch.ids),
            entries=None,
            ids=stretch.ids[start:end],
        )


@dataclass(frozen=True)
class Stretch:
    """Tokens of a document that stand side by side."""

    document: str
    """Its name."""
    start: int
    """The first of them, counted from the beginning of the document."""
    ids: Tensor
    """(n,) int64 on the CPU, one or more."""


@dataclass
class ShelfSearch:
    """See `Search`. It keeps what it computed from one step to the next."""

    part: Collection
    question: Question
    settings: MemorySettings
    _sums: ChunkSums = field(init=False)
    _counts: Tensor = field(init=False)
    _matches: Tensor = field(init=False)

    def __post_init__(self) -> None:
        """Count the words, which all steps need."""
        self._counts = count_words(self.question.words, self.part)

    def count_holding(self) -> tuple[Tensor, int]:
        """See `Search`."""
        return (self._counts > 0).sum(1), self._counts.shape[1]

    def sum_up(self, weights: Tensor) -> Totals:
        """See `Search`."""
        asked = self.question
        self._sums = sum_chunks(asked.queries, asked.places, self.part, asked.num_neighbors)
        self._matches = match_words(self.part, self._counts, weights)
        totals: dict[int, Tensor] = total_sums(self._sums)
        return {**totals, WORDS: self._matches.logsumexp(1)}

    def choose(self, totals: Totals, *, is_written: bool) -> list[Span]:
        """See `Search`."""
        # Where no head asks, one query that gives nothing: words alone find.
        num_queries = next((asked.shape[1] for asked in self.question.queries.values()), 1)
        shares = share_out(self._sums, totals, self._counts.shape[1], num_queries)
        shares = self.part.join_next(shares)
        scores = rank_part(shares, self._matches, totals[WORDS])
        num, length = self.settings.num_passages, self.settings.passage_len
        return choose_in(self.part, shares, scores, num, length, is_written=is_written)


def find_passages(
    queries: Mapping[int, Tensor],
    places: Mapping[int, Tensor],
    ids: Tensor,
    searched: Sequence[Searched],
    settings: MemorySettings,
    *,
    is_written: bool = False,
) -> tuple[Passage, ...]:
    """The best passages of one row, best one first.

    Args:
        queries: see `sum_chunks`; of no layer, words alone find.
        places: see `sum_chunks`.
        ids: (n,) of the tokens of the row's text, of which the last ones are looked for.
        searched: documents that were read before, and what the row has read itself.
        settings: how many passages, how long.
        is_written: see `choose_in`.

    Raises:
        MemoryFolderError: the text of a document was not kept, or became other tokens.
    """
    words = list_words(ids[-LAST_WORDS:])
    question = Question(queries, places, settings.num_neighbors, words)
    searches = [one.ask(question, settings) for one in searched]
    counts = [search.count_holding() for search in searches]
    holding = torch.stack([holding for holding, _ in counts]).sum(0)
    weights = weigh_words(words, holding, sum(num_chunks for _, num_chunks in counts))
    totals = add_sums([search.sum_up(weights) for search in searches])
    spans = [
        replace(span, collection=number)
        for number, search in enumerate(searches)
        for span in search.choose(totals, is_written=is_written)
    ]
    best = choose_among(spans, settings.num_passages, settings.passage_margin)
    passages: list[Passage | None] = [None] * len(best)
    for number, one in enumerate(searched):
        mine = [place for place, span in enumerate(best) if span.collection == number]
        for place, passage in zip(mine, one.fetch([best[place] for place in mine]), strict=True):
            passages[place] = passage
    return tuple(passage for passage in passages if passage is not None)
