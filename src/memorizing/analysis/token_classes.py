"""Tokens of a text by what they are part of, and by how often they were there before."""

from __future__ import annotations

import bisect
import re
from collections import Counter
from collections.abc import Collection

import numpy as np
from numpy.typing import NDArray

from memorizing.analysis.definitions import WORD

CLASSES = ("identifiers", "names", "rare words", "common words", "numbers", "signs", "blanks")
_RARE = 3
"""Words that a text has at most so often are rare."""
_CODE = re.compile(r"_|[a-z][A-Z]|[^\W\d_]\d")
_TIMES = (0, 1, 3, 7, 15, 63)
"""How often a token was there before: the largest of each class but the last."""


def classify_tokens(text: str, ends: NDArray[np.int64], defined: Collection[str]) -> list[str]:
    """The class of every token, by the word that it begins in, or is the end of.

    Identifiers are defined in the text, or are called, or have an underscore, inner capitals or a
    digit. Names begin with a capital and are never written without.

    Args:
        text: the text.
        ends: (n,), where the characters of each token end.
        defined: names that the text defines.
    """
    words = list(WORD.finditer(text))
    counts = Counter(word[0] for word in words)
    kinds = [_classify_word(text, word, counts, defined) for word in words]
    word_ends = [word.end() for word in words]
    found, start = [], 0
    for end in ends.tolist():
        piece = text[start:end]
        number = bisect.bisect_right(word_ends, start)
        if not piece.strip() and end > start:
            found.append("blanks")
        elif number < len(words) and words[number].start() < max(end, start + 1):
            found.append(kinds[number])
        else:
            found.append("signs")
        start = end
    return found


def _classify_word(
    text: str, word: re.Match[str], counts: Counter[str], defined: Collection[str]
) -> str:
    name = word[0]
    if name[0].isdigit():
        return "numbers"
    if name in defined or _CODE.search(name) or text[word.end() : word.end() + 1] == "(":
        return "identifiers"
    if name[0].isupper() and name.lower() not in counts:
        return "names"
    return "rare words" if counts[name] <= _RARE else "common words"


def count_earlier(tokens: NDArray[np.integer]) -> NDArray[np.int64]:
    """(n,) how often each token stands before itself."""
    order = np.argsort(tokens, kind="stable")
    ordered = tokens[order]
    is_new = np.r_[True, ordered[1:] != ordered[:-1]] if len(tokens) else np.zeros(0, bool)
    places = np.arange(len(tokens))
    earlier = np.empty(len(tokens), np.int64)
    earlier[order] = places - np.maximum.accumulate(np.where(is_new, places, 0))
    return earlier


def name_times(earlier: NDArray[np.int64]) -> list[str]:
    """How often a token was there before, as a class."""
    lows = [0, *(edge + 1 for edge in _TIMES)]
    names = [
        f"{low:,}" if low == high else f"{low:,} to {high:,}"
        for low, high in zip(lows, _TIMES, strict=False)
    ]
    names = ["never", "once", *names[2:], f"{lows[-1]:,} or more"]
    return [names[index] for index in np.searchsorted(_TIMES, earlier).tolist()]
