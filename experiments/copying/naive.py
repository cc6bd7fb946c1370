"""The plain versions of both caches, token by token: what `ngram.py` and `knn_lm.py` must equal."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence


class NGramCache:
    """The document's latest tokens; says what followed the longest context that it knows.

    p(x | context) = count(s x) / sum over y of count(s y), with s the longest suffix of the context
    that was followed by something (infini-gram, Liu et al. 2024), within what is kept.
    """

    def __init__(self, capacity: int, longest: int) -> None:
        """Keep at most `capacity` tokens and look for at most `longest` of them."""
        self.tokens: list[int] = []
        self.capacity, self.longest = capacity, longest

    def add(self, token: int) -> None:
        """A token comes in once it was predicted; the oldest gives way."""
        self.tokens = [*self.tokens, token][-self.capacity :]

    def count_followers(self, length: int) -> Counter[int]:
        """What followed the last `length` tokens wherever they stand among those kept."""
        kept = self.tokens
        if length > len(kept):
            return Counter()
        suffix = kept[len(kept) - length :]
        places = range(length, len(kept))
        return Counter(kept[i] for i in places if kept[i - length : i] == suffix)

    def predict(self) -> tuple[int, dict[int, float], int]:
        """Length of the longest match, the distribution, and on how many followers it rests.

        Length -1 before the first token: there is no distribution yet.
        """
        for length in range(self.longest, -1, -1):
            if followers := self.count_followers(length):
                total = followers.total()
                return length, {token: n / total for token, n in followers.items()}, total
        return -1, {}, 0


def predict_by_neighbors(
    query: Sequence[float],
    keys: Sequence[Sequence[float]],
    tokens: Sequence[int],
    k: int,
    temperature: float,
) -> dict[int, float]:
    """p(x) ~ sum of exp(-d^2 / T) over those of the k nearest keys that x followed.

    Khandelwal et al. 2020, section 2, with L2 distances d. Without a key it is empty.

    Args:
        query: the state that predicts the next token.
        keys: earlier states.
        tokens: what came after each of them.
        k: neighbors.
        temperature: T.
    """
    squares = [sum((a - b) ** 2 for a, b in zip(query, key, strict=True)) for key in keys]
    nearest = sorted(range(len(keys)), key=squares.__getitem__)[:k]
    shares: Counter[int] = Counter()
    for place in nearest:
        shares[tokens[place]] += math.exp((squares[nearest[0]] - squares[place]) / temperature)
    total = shares.total()
    return {token: share / total for token, share in shares.items()}
