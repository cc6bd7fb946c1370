"""Weights of a mixture of predictions, fitted by EM, and the nats of the mixture.

    p(x) = sum over components c of w[b, c] p_c(x)

with one line of weights for each bucket b of tokens. What bucket a token is in must be known before
the token is. The log-likelihood is concave in the weights, so EM (Dempster et al. 1977) finds its
maximum from any start inside:

    w[b, c] := mean over the bucket's tokens of w[b, c] p_c / p.

Shapes: T tokens, C components, the model's first.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

_PRIOR_TOKENS = 16.0
"""So many tokens that want what all buckets together want are added to each: some hold a few."""
_MOST_STEPS, _LEAST_GAIN = 500, 1e-7
"""EM ends when a step gains fewer nats a token."""


def fit_weights(
    shares: NDArray[np.floating], buckets: NDArray[np.integer], num_buckets: int
) -> NDArray[np.float64]:
    """The weights (num_buckets, C), rows sum to 1, that give the tokens the highest likelihood.

    Buckets are drawn towards the weights of all tokens together by as much as a few tokens weigh.

    Args:
        shares: (T, C) what each component gave the token that came; the first is above 0.
        buckets: (T,) from 0 on.
        num_buckets: how many there are, some perhaps without a token.
    """
    num = shares.shape[1]
    even = np.full((1, num), 1 / num)
    # Only ratios matter; the model's own share can be tiny.
    scaled = (shares / shares.max(1, keepdims=True)).astype(np.float64)
    pooled = _climb(scaled, np.zeros(len(scaled), np.int64), even, 0.0)
    if num_buckets == 1:
        return pooled
    start = np.repeat(0.9 * pooled + 0.1 * even, num_buckets, 0)
    return _climb(scaled, buckets, start, _PRIOR_TOKENS * pooled)


def _climb(
    shares: NDArray[np.float64],
    buckets: NDArray[np.integer],
    weights: NDArray[np.float64],
    prior: NDArray[np.float64] | float,
) -> NDArray[np.float64]:
    num_buckets, num = weights.shape
    before = -np.inf
    for _ in range(_MOST_STEPS):
        parts = weights[buckets] * shares
        total = parts.sum(1)
        if (now := float(np.log(total).mean())) - before < _LEAST_GAIN:
            break
        before = now
        parts /= total[:, None]
        sums = [np.bincount(buckets, parts[:, c], num_buckets) for c in range(num)]
        wanted = np.stack(sums, 1) + prior
        weights = wanted / wanted.sum(1, keepdims=True)
    return weights


def mix(
    shares: NDArray[np.floating], buckets: NDArray[np.integer], weights: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Nats (T,) of the tokens under the mixture: -ln of the weighted sum of (T, C) shares."""
    return -np.log((weights[buckets] * shares).sum(1, dtype=np.float64))


def number_buckets(
    *places: tuple[NDArray[np.integer], Sequence[int]],
) -> tuple[NDArray[np.int64], int]:
    """One bucket for every combination of ranges, and how many there are.

    Args:
        places: values (T,), and where ranges begin but for the first, rising.
    """
    buckets, num = np.zeros(len(places[0][0]), np.int64), 1
    for values, edges in places:
        buckets = buckets * (len(edges) + 1) + np.searchsorted(edges, values, side="right")
        num *= len(edges) + 1
    return buckets, num
