"""Texts that have the words of another one: BM25, by the library bm25s."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from memorizing.errors import IndexUnavailableError

_WORDS = re.compile(r"[^\W\d]\w*|\d+|[^\w\s]")


class WordScorer:
    """BM25 of words, numbers and signs (Robertson; Lucene's variant, k1 = 1.5, b = 0.75)."""

    def __init__(self, texts: Sequence[str]) -> None:
        """Index texts, which may be empty.

        Raises:
            IndexUnavailableError: bm25s is not installed.
        """
        words = [_WORDS.findall(text) for text in texts]
        self._num_texts, self._index = len(words), import_bm25s().BM25()
        self._knows_words = any(words)
        if self._knows_words:
            self._index.index(words, show_progress=False)
        arrays = self._index.scores.values() if self._knows_words else ()
        self.num_bytes = sum(array.nbytes for array in arrays if isinstance(array, np.ndarray))

    def score(self, query: str) -> NDArray[np.floating[Any]]:
        """(texts,): larger is better; -inf for a text without a word of the query."""
        words = _WORDS.findall(query)
        if not words or not self._knows_words:
            return np.full(self._num_texts, -np.inf)
        scores = self._index.get_scores(words)
        return np.where(scores > 0, scores, -np.inf)


def choose_apart(
    scores: NDArray[np.floating[Any]], spans: Sequence[tuple[str, int, int]], count: int
) -> list[int]:
    """Numbers of the best passages, best first, at most so many; none overlap.

    Args:
        scores: (spans,), larger is better; those of -inf are never chosen.
        spans: of each its document, first token, and the one after its last.
        count: at most.
    """
    chosen: list[int] = []
    for number in np.argsort(-scores, kind="stable").tolist():
        if len(chosen) == count or scores[number] == -np.inf:
            break
        name, start, end = spans[number]
        others = [spans[other] for other in chosen]
        if all(name != other or end <= first or last <= start for other, first, last in others):
            chosen.append(number)
    return chosen


def import_bm25s() -> Any:
    """The library.

    Raises:
        IndexUnavailableError: it is not installed.
    """
    try:
        import bm25s
    except ImportError as error:
        raise IndexUnavailableError(
            'BM25 needs bm25s, which is not installed; pip install "memorizing[bm25]"'
        ) from error
    return bm25s
