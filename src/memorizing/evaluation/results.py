"""What an evaluation found: nats per token, and every number as sums of them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from memorizing.config import Control
from memorizing.errors import ConfigError
from memorizing.metrics import (
    POSITION_EDGES,
    Difference,
    PositionBucket,
    Totals,
    bucket_by_position,
    compare_token_nats,
)


@dataclass(frozen=True)
class DocumentResult:
    """The nats of every token of a document."""

    name: str
    token_nats: NDArray[np.float32]
    num_bytes: int | None
    """Bytes of the raw text; None where only the first tokens were read."""

    @cached_property
    def totals(self) -> Totals:
        """Sums over the document."""
        return Totals(
            float(self.token_nats.sum(dtype=np.float64)), len(self.token_nats), self.num_bytes
        )


@dataclass(frozen=True)
class EvaluationResult:
    """What a model makes of some documents with one memory. All numbers come from sums."""

    documents: tuple[DocumentResult, ...]
    """In the order given."""
    capacity: int
    """Entries the memory held at most; 0 is no memory."""
    control: Control | None = None

    @cached_property
    def totals(self) -> Totals:
        """Sums over all documents."""
        return sum((document.totals for document in self.documents), Totals())

    @property
    def nats(self) -> float:
        """Summed cross entropy."""
        return self.totals.nats

    @property
    def tokens(self) -> int:
        """Tokens counted."""
        return self.totals.tokens

    @property
    def bytes(self) -> int | None:
        """Bytes of the raw texts; None where documents were read in part."""
        return self.totals.bytes

    @property
    def perplexity(self) -> float:
        """exp(nats / tokens)."""
        return self.totals.perplexity

    @property
    def bits_per_byte(self) -> float:
        """Nats / ln 2 / bytes; NaN where documents were read in part."""
        return self.totals.bits_per_byte

    @property
    def longest(self) -> int:
        """Tokens of the longest document: a capacity above it changes nothing."""
        return max(len(document.token_nats) for document in self.documents)

    def by_position(self, edges: Sequence[int] = POSITION_EDGES) -> tuple[PositionBucket, ...]:
        """Sums and perplexity by a token's position in its document; see `bucket_by_position`."""
        return bucket_by_position((document.token_nats for document in self.documents), edges)

    def to_dict(self) -> dict[str, Any]:
        """For JSON: totals, by position and per document; bytes that are not known are null."""
        return {
            "capacity": self.capacity,
            "control": self.control,
            **_describe(self.totals),
            "by_position": [
                {**asdict(bucket), "perplexity": bucket.perplexity} for bucket in self.by_position()
            ],
            "documents": [{"name": d.name, **_describe(d.totals)} for d in self.documents],
        }


def _describe(totals: Totals) -> dict[str, Any]:
    return {
        "perplexity": totals.perplexity,
        "bits_per_byte": None if math.isnan(totals.bits_per_byte) else totals.bits_per_byte,
        "nats": totals.nats,
        "tokens": totals.tokens,
        "bytes": totals.bytes,
    }


def compare_results(
    result: EvaluationResult,
    baseline: EvaluationResult,
    *,
    block_len: int = 4096,
    num_resamples: int = 10_000,
    seed: int = 0,
) -> Difference:
    """Paired difference of two results on the same documents: see `metrics.compare_token_nats`.

    Negative means that `result` is better than `baseline`.

    Raises:
        ConfigError: the documents or their numbers of tokens differ.
    """
    names, baseline_names = (tuple(d.name for d in r.documents) for r in (result, baseline))
    if names != baseline_names:
        missing = sorted(set(names) ^ set(baseline_names))
        what = f"{missing[0]!r} is in one only" if missing else "their order differs"
        raise ConfigError(
            f"results of {len(names)} and {len(baseline_names)} documents cannot be compared "
            f"({what}); evaluate both on the same documents"
        )
    return compare_token_nats(
        [document.token_nats for document in result.documents],
        [document.token_nats for document in baseline.documents],
        block_len=block_len,
        num_resamples=num_resamples,
        seed=seed,
    )
