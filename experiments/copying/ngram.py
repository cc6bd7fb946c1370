"""A document's n-gram cache: what followed the longest context that stands earlier in it.

p(x | context) = count(s x) / sum over y of count(s y), with s the longest suffix of the context
that was followed by something earlier in the same document (infini-gram, Liu et al. 2024, with the
document instead of a corpus). Causal: a token counts from the next prediction on, so the cache also
holds what the model's local attention sees. All tokens of a document at once, in NumPy; `naive.py`
is the same token by token.

Shapes: T tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

LONGEST = 16
"""Tokens of a context that are looked for at most."""
SHORTER = (0, 1, 2)
"""Tokens of the contexts whose followers are counted beside those of the longest."""
TOKEN_BYTES, POINTER_BYTES = 2, 4
"""A token of up to 65,536 kinds, and its place in a suffix array. infini-gram's takes as much; one
that grows and forgets takes several times more, and still next to nothing beside a memory."""


@dataclass(frozen=True)
class Matches:
    """What the cache says before each token, and how much of it is for the token that came."""

    lengths: NDArray[np.int64]
    """(T,) tokens of the longest context that is known; 0: none but the empty one, -1: the cache
    is empty."""
    counts: NDArray[np.int64]
    """(T,) how often something followed that context."""
    shares: NDArray[np.float64]
    """(T,) p of the token that came; 0 where nothing is known."""
    shorter: NDArray[np.float64]
    """(T, len(SHORTER)) likewise by shorter contexts, or by the longest where it is no longer."""
    followed: NDArray[np.int64]
    """(T,) tokens of the longest context that was followed by *this* token before: 0 for a token
    that is there but in no such pair, -1 for one that is not there."""


def match_contexts(
    tokens: NDArray[np.integer], capacity: int | None = None, longest: int = LONGEST
) -> Matches:
    """What an n-gram cache of the document's latest tokens predicts, for every token.

    Args:
        tokens: (T,) of a document.
        capacity: how many of the latest tokens are kept; None keeps all.
        longest: tokens of a context that are looked for at most, 2 or more.
    """
    num = len(tokens)
    oldest = np.maximum(np.arange(num) - (num if capacity is None else capacity), 0)
    _, kinds = np.unique(tokens, return_inverse=True)
    num_kinds = int(kinds.max(initial=0)) + 1
    lengths, followed = np.full(num, -1), np.full(num, -1)
    counts, shares = np.zeros(num, np.int64), np.zeros(num)
    shorter = []
    contexts = np.zeros(num, np.int64)  # of the first `length` tokens none has a whole context
    for length in range(longest + 1):
        if length:
            before = kinds[: num - length]
            pairs = contexts[length:] * num_kinds + before
            _, contexts[length:] = np.unique(pairs, return_inverse=True)
        _, wholes = np.unique(contexts[length:] * num_kinds + kinds[length:], return_inverse=True)
        # A whole context begins no earlier than what is kept: so counted, its end is at `oldest`.
        known = _count_earlier(contexts[length:], oldest[length:])
        seen = _count_earlier(wholes, oldest[length:])
        is_known, is_seen = known > 0, seen > 0
        lengths[length:][is_known] = length
        counts[length:][is_known] = known[is_known]
        shares[length:][is_known] = seen[is_known] / known[is_known]
        followed[length:][is_seen] = length
        if length in SHORTER:
            shorter.append(shares.copy())
        elif not is_known.any():
            break
    return Matches(lengths, counts, shares, np.stack(shorter, 1), followed)


def _count_earlier(groups: NDArray[np.int64], first: NDArray[np.int64]) -> NDArray[np.int64]:
    """(n,) how many of the elements from `first[i]` up to i, without it, are of the group of i."""
    num = len(groups)
    places = np.arange(num)
    ordered = np.sort(groups * num + places)
    upper = np.searchsorted(ordered, groups * num + places)
    # Nothing is kept where `first` is beyond i: a context longer than the cache.
    return upper - np.searchsorted(ordered, groups * num + np.minimum(first, places))
