"""Tokens by whether the document's n-grams could have told them, and what memory changes there."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from ngram import LONGEST
from numpy.typing import NDArray
from summary import Layout, Nats, sum_blocks

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


def sum_classes(
    without: dict[str, Nats], with_memory: dict[str, Nats], followed: Sequence[NDArray[np.int64]]
) -> dict[str, dict[str, Any]]:
    """What is kept of each class of a pair of runs; a class without a token is left out.

    Args:
        without: nats of the model without memory, by arm.
        with_memory: likewise of the model with memory.
        followed: the longest context that each token has followed before.

    Returns:
        By class: by block its tokens, and the nats that memory adds to them, alone (`memory`) and
        once both models have all that copies (`memory_on_top`); by arm the sums of nats.
    """
    rows = {}
    for name, (low, high) in CLASSES.items():
        inside = [(low <= part) & (part <= high) for part in followed]

        def sum_inside(nats: Nats, inside: list[NDArray[np.bool_]] = inside) -> NDArray[np.float64]:
            return sum_blocks([np.where(i, n, 0.0) for n, i in zip(nats, inside, strict=True)])

        tokens = sum_blocks(inside)
        if tokens.any():
            rows[name] = {
                "tokens": tokens.astype(np.int64),
                "memory": sum_inside(with_memory["nothing"]) - sum_inside(without["nothing"]),
                "memory_on_top": sum_inside(with_memory["together"])
                - sum_inside(without["together"]),
                "without": {arm: sum_inside(nats).sum() for arm, nats in without.items()},
                "with_memory": {arm: sum_inside(nats).sum() for arm, nats in with_memory.items()},
            }
    return rows


def summarize_classes(
    seeds: Sequence[dict[str, dict[str, Any]]], layout: Layout
) -> dict[str, dict[str, Any]]:
    """Nats of each class of tokens by arm, and what part of the gain of memory is theirs.

    Args:
        seeds: of each what `sum_classes` kept.
        layout: of the blocks.
    """
    parts = list(CLASSES)[:2]
    gained = sum(
        np.sum(found[name]["memory"]) for found in seeds for name in parts if name in found
    )
    rows = {}
    for name, first in seeds[0].items():
        tokens = np.array(first["tokens"], np.float64)
        mine = [found[name] for found in seeds]
        rows[name] = {
            "tokens": int(tokens.sum()),
            "share_of_tokens": tokens.sum() / layout.tokens.sum(),
            "share_of_gain": sum(np.sum(found["memory"]) for found in mine) / gained,
        }
        for model in ("without", "with_memory"):
            rows[name][model] = {
                arm: np.mean([found[model][arm] for found in mine]) / tokens.sum()
                for arm in first[model]
            }
        for kind in ("memory", "memory_on_top"):
            gone = np.mean([found[kind] for found in mine], 0)
            rows[name][kind] = _describe_inside(gone, tokens, layout)
    return rows


def _describe_inside(
    gone: NDArray[np.float64], tokens: NDArray[np.float64], layout: Layout
) -> dict[str, Any]:
    """Relative change of perplexity of some tokens, with an interval where they are many."""
    low, high = -math.inf, math.inf
    starts = np.cumsum([0, *layout.num_blocks[:-1]])
    if tokens.sum() >= _LEAST_TOKENS and np.add.reduceat(tokens, starts).all():
        low, high = bootstrap_ratio(gone, tokens, layout.num_blocks)
    return {
        "value": math.expm1(gone.sum() / tokens.sum()),
        "low": float(np.expm1(low)),
        "high": float(np.expm1(high)),
    }
