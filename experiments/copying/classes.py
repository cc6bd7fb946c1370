"""Tokens by whether the document's n-grams could have told them, and what memory changes there."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from ngram import LONGEST
from numpy.typing import NDArray
from summary import Nats, average, sum_blocks

from memorizing.metrics import bootstrap_ratio

_LEAST_TOKENS = 1000
"""Of a class, for an interval."""

CLASSES: dict[str, tuple[int, int]] = {
    "no context: no n-gram could have told": (-1, 0),
    "a context of any length": (1, LONGEST),
    "none, new to the document": (-1, -1),
    "none, but it is there": (0, 0),
    "1": (1, 1),
    "2 to 3": (2, 3),
    "4 to 7": (4, 7),
    "8 to 15": (8, 15),
    "16 or more": (16, LONGEST),
}
"""Tokens by the longest context that they have followed anywhere earlier in the document: in two
parts, then each part in finer ones."""


def summarize_classes(
    without: dict[str, list[Nats]],
    with_memory: dict[str, list[Nats]],
    followed: Sequence[NDArray[np.int64]],
) -> dict[str, dict[str, Any]]:
    """Nats of each class of tokens by arm, and what part of the gain of memory is theirs.

    Args:
        without: nats of the model without memory, by arm and seed.
        with_memory: likewise of the model with memory.
        followed: the longest context that each token has followed before.
    """
    num_tokens = sum(map(len, followed))
    means, mean_with = (
        {name: average(seeds) for name, seeds in models.items()}
        for models in (without, with_memory)
    )
    alone, memory = means["nothing"], mean_with["nothing"]
    gained = sum(float((a - b).sum()) for a, b in zip(alone, memory, strict=True))
    rows = {}
    for name, (low, high) in CLASSES.items():
        inside = [(low <= part) & (part <= high) for part in followed]
        tokens = sum(int(part.sum()) for part in inside)
        if not tokens:
            continue
        pick = _make_picker(inside)
        chosen = pick(alone), pick(memory)
        rows[name] = {
            "tokens": tokens,
            "share_of_tokens": tokens / num_tokens,
            "share_of_gain": float((chosen[0] - chosen[1]).sum()) / gained,
            "without": {arm: float(pick(nats).mean()) for arm, nats in means.items()},
            "with_memory": {arm: float(pick(nats).mean()) for arm, nats in mean_with.items()},
            "memory": _compare_inside(memory, alone, inside),
            "memory_on_top": _compare_inside(mean_with["together"], means["together"], inside),
        }
    return rows


def _make_picker(inside: Sequence[NDArray[np.bool_]]) -> Callable[[Nats], NDArray[np.float64]]:
    return lambda nats: np.concatenate([n[i] for n, i in zip(nats, inside, strict=True)])


def _compare_inside(
    nats: Nats, baseline: Nats, inside: Sequence[NDArray[np.bool_]]
) -> dict[str, Any]:
    """Relative change of perplexity of some tokens, with an interval where they are many."""
    gone, num_blocks = sum_blocks(
        [np.where(i, a - b, 0.0) for a, b, i in zip(nats, baseline, inside, strict=True)]
    )
    tokens, _ = sum_blocks(inside)
    low, high = -math.inf, math.inf
    if tokens.sum() >= _LEAST_TOKENS and all(part.any() for part in inside):
        low, high = bootstrap_ratio(gone, tokens, num_blocks)
    return {
        "value": math.expm1(gone.sum() / tokens.sum()),
        "low": float(np.expm1(low)),
        "high": float(np.expm1(high)),
    }
