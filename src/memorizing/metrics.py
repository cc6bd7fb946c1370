"""Numbers of a language model from sums of nats, tokens and bytes; never a mean of means."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from memorizing.errors import ConfigError

POSITION_EDGES = (512, 2048, 8192, 32_768, 131_072, 524_288)
"""Where the buckets of a position in a document end, by default."""

_RESAMPLE_ELEMENTS = 1 << 22


def compute_perplexity(nats_per_token: float) -> float:
    """exp(nats per token), infinite beyond what a float holds."""
    try:
        return math.exp(nats_per_token)
    except OverflowError:
        return math.inf


@dataclass(frozen=True)
class Totals:
    """Summed nats, tokens and bytes of some text; add them to join texts."""

    nats: float = 0.0
    tokens: int = 0
    bytes: int | None = 0
    """Bytes of the raw text; None where they are not known: a document was read in part."""

    def __add__(self, other: Totals) -> Totals:
        """The totals of both texts."""
        known = self.bytes is not None and other.bytes is not None
        return Totals(
            self.nats + other.nats,
            self.tokens + other.tokens,
            self.bytes + other.bytes if known else None,  # type: ignore[operator]
        )

    @property
    def perplexity(self) -> float:
        """exp(nats / tokens); NaN without a token, infinite beyond what a float holds."""
        return compute_perplexity(self.nats / self.tokens) if self.tokens else math.nan

    @property
    def bits_per_byte(self) -> float:
        """Nats / ln 2 / bytes, comparable between tokenizers; NaN without bytes or if unknown."""
        return self.nats / math.log(2) / self.bytes if self.bytes else math.nan


@dataclass(frozen=True)
class PositionBucket:
    """The tokens whose position in their document is from `start` up to, not including, `end`."""

    start: int
    end: int | None
    """None: up to the longest document's end."""
    nats: float
    tokens: int

    @property
    def perplexity(self) -> float:
        """exp(nats / tokens)."""
        return compute_perplexity(self.nats / self.tokens)


def bucket_by_position(
    token_nats: Iterable[NDArray[np.floating[Any]]], edges: Sequence[int] = POSITION_EDGES
) -> tuple[PositionBucket, ...]:
    """Sum nats by the position of a token in its document.

    Args:
        token_nats: for every document the nats of its tokens, from the first to the last.
        edges: ends of the buckets, rising; a last bucket holds everything from the last edge on.

    Returns:
        The buckets that hold a token, in order.

    Raises:
        ConfigError: edges that do not rise, or start at 0 or less.
    """
    bounds = [0, *edges]
    if any(low >= high for low, high in zip(bounds, bounds[1:], strict=False)):
        raise ConfigError(
            f"position edges are {list(edges)}; give rising positions from 1 on, such as 512, 2048"
        )
    documents = list(token_nats)
    buckets = []
    for start, end in zip(bounds, [*bounds[1:], None], strict=True):
        parts = [nats[start:end] for nats in documents]
        tokens = sum(len(part) for part in parts)
        if tokens:
            nats = math.fsum(float(part.sum(dtype=np.float64)) for part in parts)
            buckets.append(PositionBucket(start, end, nats, tokens))
    return tuple(buckets)


@dataclass(frozen=True)
class Difference:
    """How a result differs from a baseline on the same tokens; negative means the result is better.

    The interval holds 95% of the bootstrap's resamples: see `bootstrap_ratio`. A single block has
    no interval: it is infinite then.
    """

    nats_per_token: float
    """Mean over tokens of result - baseline."""
    low: float
    high: float
    num_blocks: int
    num_tokens: int

    @property
    def perplexity_change(self) -> float:
        """Relative change of perplexity, exp(nats_per_token) - 1: -0.05 is 5% lower."""
        return math.expm1(self.nats_per_token)

    @property
    def perplexity_interval(self) -> tuple[float, float]:
        """95% interval of `perplexity_change`."""
        return math.expm1(self.low), math.expm1(self.high)

    @property
    def excludes_zero(self) -> bool:
        """Whether the 95% interval lies on one side of zero."""
        return self.low > 0 or self.high < 0

    def to_dict(self) -> dict[str, Any]:
        """For JSON; an infinite interval is null."""
        low, high = self.perplexity_interval
        values = asdict(self) | {
            "perplexity_change": self.perplexity_change,
            "perplexity_low": low,
            "perplexity_high": high,
        }
        if math.isinf(self.low):
            values.update(dict.fromkeys(("low", "high", "perplexity_low", "perplexity_high")))
        return values


def compare_token_nats(
    nats: Sequence[NDArray[np.floating[Any]]],
    baseline: Sequence[NDArray[np.floating[Any]]],
    *,
    block_len: int = 4096,
    num_resamples: int = 10_000,
    seed: int = 0,
) -> Difference:
    """Paired difference of two models on the same tokens, with a 95% interval by bootstrap.

    Neighboring tokens are not independent, and neither are the parts of a document: documents are
    drawn with replacement, and in each drawn one blocks of `block_len` consecutive tokens (its last
    may be shorter). The difference is the sum of the drawn blocks' differences over the sum of
    their tokens. Documents without a token are left out.

    Args:
        nats: per document the nats of its tokens.
        baseline: the same tokens under the baseline.
        block_len: tokens of a block.
        num_resamples: how often documents and their blocks are drawn.
        seed: of the draws.

    Raises:
        ConfigError: other numbers of tokens in the two, no token at all, or an argument below 1.
    """
    if block_len < 1 or num_resamples < 1:
        raise ConfigError(
            f"block_len is {block_len} and num_resamples {num_resamples}; both must be 1 or more"
        )
    lens, baseline_lens = [len(part) for part in nats], [len(part) for part in baseline]
    if lens != baseline_lens or not sum(lens):
        raise ConfigError(
            f"results of {sum(lens):,} tokens in {len(lens)} documents and {sum(baseline_lens):,} "
            f"tokens in {len(baseline_lens)} cannot be compared token by token; evaluate both on "
            "the same documents, with the same tokenizer"
        )
    sums, baseline_sums, counts = [], [], []
    for mine, theirs in zip(nats, baseline, strict=True):
        starts = np.arange(0, len(mine), block_len)
        if len(starts):
            sums.append(np.add.reduceat(mine.astype(np.float64), starts))
            baseline_sums.append(np.add.reduceat(theirs.astype(np.float64), starts))
            counts.append(np.diff(starts, append=len(mine)))
    return compare_block_nats(
        np.concatenate(sums),
        np.concatenate(baseline_sums),
        np.concatenate(counts),
        [len(part) for part in sums],
        num_resamples=num_resamples,
        seed=seed,
    )


def compare_block_nats(
    nats: NDArray[np.float64],
    baseline: NDArray[np.float64],
    tokens: NDArray[np.integer[Any]],
    num_blocks: Sequence[int],
    *,
    num_resamples: int = 10_000,
    seed: int = 0,
) -> Difference:
    """`compare_token_nats` where the sums over blocks are known and tokens no longer are.

    Args:
        nats: summed over each block, (blocks,), document by document. Of several runs: their mean,
            so that a block is drawn in all of them.
        baseline: the same blocks under the baseline.
        tokens: of each block.
        num_blocks: of each document, 1 or more.
        num_resamples: how often documents and their blocks are drawn.
        seed: of the draws.

    Raises:
        ConfigError: other numbers of blocks in the four, or no token at all.
    """
    if not len(nats) == len(baseline) == len(tokens) or not tokens.sum():
        raise ConfigError(
            f"results of {len(nats):,} and {len(baseline):,} blocks with {int(tokens.sum()):,} "
            f"tokens in {len(tokens):,} blocks cannot be compared; evaluate both on the same "
            "documents, with the same tokenizer"
        )
    sums = nats - baseline
    low, high = bootstrap_ratio(sums, tokens, num_blocks, num_resamples=num_resamples, seed=seed)
    num_tokens = int(tokens.sum())
    return Difference(float(sums.sum()) / num_tokens, low, high, len(sums), num_tokens)


def bootstrap_ratio(
    numerators: NDArray[np.float64],
    denominators: NDArray[np.floating[Any]] | NDArray[np.integer[Any]],
    num_blocks: Sequence[int],
    *,
    num_resamples: int = 10_000,
    seed: int = 0,
) -> tuple[float, float]:
    """95% interval of sum(numerators) / sum(denominators), documents and their blocks drawn.

    Blocks of a document are alike: drawn from all documents at once they would give intervals that
    are too narrow. Of a single document only its blocks can be drawn, which says what other parts
    of it would change, not other documents.

    Args:
        numerators: of each block, (blocks,), document by document.
        denominators: of each block; sums over drawn blocks must not be 0.
        num_blocks: of each document, 1 or more.
        num_resamples: how often documents and their blocks are drawn.
        seed: of the draws.

    Returns:
        Its ends; infinite with fewer than two blocks.

    Raises:
        ConfigError: a document without a block, or other numbers of blocks in the three.
    """
    total = len(numerators)
    if not total == len(denominators) == sum(num_blocks) or min(num_blocks, default=1) < 1:
        raise ConfigError(
            f"{total:,} blocks with {len(denominators):,} denominators in documents of "
            f"{list(num_blocks)} blocks cannot be drawn; give every document's blocks, 1 or more"
        )
    if total < 2:
        return -math.inf, math.inf
    rng = np.random.default_rng(seed)
    ratios = np.empty(num_resamples)
    step = max(1, _RESAMPLE_ELEMENTS // total)
    for start in range(0, num_resamples, step):
        counts = draw_blocks(num_blocks, min(step, num_resamples - start), rng)
        ratios[start : start + step] = (counts @ numerators) / (counts @ denominators)
    low, high = np.quantile(ratios, (0.025, 0.975))
    return float(low), float(high)


def draw_blocks(
    num_blocks: Sequence[int], num_resamples: int, rng: np.random.Generator
) -> NDArray[np.float64]:
    """How often each block is drawn: documents with replacement, in each as many as it has.

    Args:
        num_blocks: of each document, 1 or more.
        num_resamples: how often documents and their blocks are drawn.
        rng: what draws.

    Returns:
        (num_resamples, blocks).
    """
    lens = np.array(num_blocks)
    starts = np.cumsum(lens) - lens
    documents = rng.integers(len(lens), size=(num_resamples, len(lens)))
    drawn = lens[documents]  # blocks to draw in each drawn document
    of_slot = np.repeat(documents.ravel(), drawn.ravel())
    blocks = starts[of_slot] + rng.integers(lens[of_slot])
    rows = np.repeat(np.arange(num_resamples), drawn.sum(axis=1))
    total = int(lens.sum())
    counts = np.bincount(rows * total + blocks, minlength=num_resamples * total)
    return counts.reshape(num_resamples, total).astype(np.float64)
