"""What copying gives of the gain of memory, and what memory adds on top of copying.

Weights are fitted to each run on its validation documents, then kept for its test documents. Over
seeds, nats are averaged block by block, and an interval draws documents and their blocks in all
models and seeds at once, as everywhere in the results.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from fitting import fit_weights, mix, number_buckets
from measuring import DocumentArrays, count_entry_bytes, count_state_bytes
from ngram import LONGEST, POINTER_BYTES, TOKEN_BYTES, Matches, match_contexts
from numpy.typing import NDArray

from memorizing.config import ModelConfig
from memorizing.metrics import Difference, bootstrap_ratio, compare_block_nats, compute_perplexity

NGRAM_BYTES = TOKEN_BYTES + POINTER_BYTES
BLOCK_LEN = 4096
"""Tokens that are drawn together."""
LENGTH_EDGES, COUNT_EDGES = tuple(range(1, LONGEST + 1)), (2, 3, 8)
"""Weights depend on the length of the longest match, and on how often it was followed."""


@dataclass(frozen=True)
class Arm:
    """What is mixed into a model's prediction."""

    about: str
    ngram: bool = False
    """The longest match."""
    shorter: bool = False
    """And what followed the last two tokens, the last, and anything."""
    near: bool = False
    """n-grams of as many tokens as the memory has entries, instead of as its bytes hold."""
    neighbors: bool = False
    """kNN-LM."""


ARMS = {
    "nothing": Arm("the model alone"),
    "ngram": Arm("n-grams: the longest match", ngram=True),
    "ngrams": Arm("n-grams: the longest match and shorter ones", ngram=True, shorter=True),
    "ngrams_near": Arm("the same, of as many tokens as entries", True, True, near=True),
    "knn_lm": Arm("kNN-LM", neighbors=True),
    "together": Arm("n-grams of all lengths and kNN-LM", True, True, neighbors=True),
}


@dataclass(frozen=True)
class Document:
    """A document as one run predicts it, beside what its n-grams say."""

    arrays: DocumentArrays
    matches: Matches
    """Of the cache of equal bytes."""
    near: Matches
    """Of the cache of as many tokens as the memory has entries."""


class Matcher:
    """n-gram matches, found once for a document and a capacity."""

    def __init__(self) -> None:
        self._found: dict[tuple[bytes, int], Matches] = {}

    def match(self, tokens: NDArray[np.int32], capacity: int) -> Matches:
        """As `match_contexts`."""
        key = (tokens.tobytes(), min(capacity, len(tokens)))
        if key not in self._found:
            self._found[key] = match_contexts(tokens, capacity)
        return self._found[key]

    def extend(self, documents: Sequence[DocumentArrays], config: ModelConfig) -> list[Document]:
        """Documents beside the matches at equal bytes and at equal tokens."""
        return [
            Document(
                d,
                self.match(d.tokens, d.size * count_entry_bytes(config) // NGRAM_BYTES),
                self.match(d.tokens, d.size),
            )
            for d in documents
        ]


def describe_bytes(config: ModelConfig, size: int) -> dict[str, Any]:
    """Bytes of a memory of `size` entries, and what each takes of a token and keeps in them."""
    total = size * count_entry_bytes(config)
    per_token = {
        "memory": count_entry_bytes(config),
        "ngram": NGRAM_BYTES,
        "knn_lm": count_state_bytes(config),
    }
    kept = {name: total // of_token for name, of_token in per_token.items()}
    return {"total": total, "per_token": per_token, "tokens_kept": kept}


def gather_shares(
    document: Document, arm: Arm
) -> tuple[NDArray[np.float64], NDArray[np.int64], int]:
    """What the components of an arm gave each token (T, C), the tokens' buckets, and their number.

    A cache that is empty says what the model says.
    """
    model = document.arrays.model
    matches = document.near if arm.near else document.matches
    columns = [model]
    if arm.ngram:
        columns.append(matches.shares)
    if arm.shorter:
        columns.extend(matches.shorter.T)
    if arm.neighbors:
        columns.append(document.arrays.neighbors)
    shares = np.stack(columns, 1)
    is_empty = matches.lengths < 0
    shares[is_empty] = model[is_empty, None]
    if not arm.ngram:
        return shares, np.zeros(len(model), np.int64), 1
    return shares, *number_buckets((matches.lengths, LENGTH_EDGES), (matches.counts, COUNT_EDGES))


def predict_test(
    validation: Sequence[Document], test: Sequence[Document], arm: Arm
) -> list[NDArray[np.float64]]:
    """Nats of every token of the test documents, by weights fitted to the validation documents."""
    if arm == ARMS["nothing"]:
        return [-np.log(document.arrays.model) for document in test]
    fitted = [gather_shares(document, arm) for document in validation]
    shares, buckets = (np.concatenate(part) for part in list(zip(*fitted, strict=True))[:2])
    weights = fit_weights(shares, buckets, fitted[0][2])
    return [mix(*gather_shares(document, arm)[:2], weights) for document in test]


Nats = list[NDArray[np.float64]]
"""Of every token, by document."""


@dataclass(frozen=True)
class Layout:
    """The blocks of all test documents, one after another. B blocks."""

    lens: tuple[int, ...]
    """Tokens of each document."""

    @property
    def num_blocks(self) -> list[int]:
        """Of each document."""
        return [-(-length // BLOCK_LEN) for length in self.lens]

    @property
    def tokens(self) -> NDArray[np.int64]:
        """(B,) of each block."""
        starts = [np.arange(0, length, BLOCK_LEN) for length in self.lens]
        return np.concatenate(
            [np.diff(part, append=n) for part, n in zip(starts, self.lens, strict=True)]
        )


def sum_blocks(
    values: Sequence[NDArray[np.float64] | NDArray[np.bool_]],
) -> NDArray[np.float64]:
    """(B,) sums, of values by document and token."""
    sums = [
        np.add.reduceat(part.astype(np.float64), np.arange(0, len(part), BLOCK_LEN))
        for part in values
    ]
    return np.concatenate(sums)


BySeed = list[NDArray[np.float64]]
"""Sums over blocks (B,) of every seed."""


def summarize(
    without: dict[str, BySeed], with_memory: dict[str, BySeed], layout: Layout
) -> dict[str, dict[str, Any]]:
    """Each arm on both models: nats, changes, shares of the gain of memory.

    Args:
        without: nats of the model without memory, by arm.
        with_memory: likewise of the model with memory, of the same seeds.
        layout: of the blocks.
    """
    means, mean_with = (
        {name: np.mean(seeds, 0) for name, seeds in models.items()}
        for models in (without, with_memory)
    )
    alone, memory = means["nothing"], mean_with["nothing"]

    def compare(nats: NDArray[np.float64], baseline: NDArray[np.float64]) -> Difference:
        return compare_block_nats(nats, baseline, layout.tokens, layout.num_blocks)

    gap = alone - memory
    is_gained = compare(memory, alone).high < 0

    def share(gone: NDArray[np.float64]) -> dict[str, Any]:
        """Of the gain of memory, in nats; null where there is no gain to speak of."""
        low, high = -math.inf, math.inf
        if is_gained:
            low, high = bootstrap_ratio(gone, gap, layout.num_blocks)
        value = float(gone.sum() / gap.sum()) if gap.sum() > 0 else math.nan
        return {"value": value, "low": low, "high": high}

    def describe(name: str, models: dict[str, BySeed]) -> dict[str, Any]:
        nats, tokens = np.mean(models[name], 0), int(layout.tokens.sum())
        per_token = float(nats.sum()) / tokens
        by_seed = [
            float(np.expm1((mine - theirs).sum() / tokens))
            for mine, theirs in zip(models[name], without["nothing"], strict=True)
        ]
        return {
            "nats_per_token": per_token,
            "perplexity": compute_perplexity(per_token),
            "change": _describe_change(compare(nats, alone)),
            "change_by_seed": by_seed,
        }

    rows = {}
    for name, nats in means.items():
        both = mean_with[name]
        rows[name] = {
            "without": describe(name, without),
            "with_memory": describe(name, with_memory),
            "memory_against_it": _describe_change(compare(memory, nats)),
            "memory_on_top": _describe_change(compare(both, nats)),
            "it_on_memory": _describe_change(compare(both, memory)),
            "share_of_gain": share(alone - nats),
            "share_left": share(nats - both),
        }
    return rows


def _describe_change(change: Difference) -> dict[str, Any]:
    """Of perplexity, relative."""
    low, high = change.perplexity_interval
    return {"value": change.perplexity_change, "low": low, "high": high}
