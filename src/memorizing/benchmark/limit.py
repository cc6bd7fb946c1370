"""The arithmetic limit of a training step: its model FLOPs at the speed of large products.

Shapes: T tokens of a segment, d model_dim, H heads, D head_dim.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from memorizing.config import ModelConfig


def count_window_pairs(segment_len: int, window: int, num_cached: int) -> int:
    """(query, key) pairs inside the causal window, over the tokens of one segment.

    Token i of the segment, counted from 0, sees itself, the i tokens before it and the cached ones,
    at most `window` in all: sum of min(window, num_cached + i + 1).
    """
    return sum(min(window, num_cached + place + 1) for place in range(segment_len))


def count_forward_flops(config: ModelConfig) -> int:
    """Floating-point operations of the matrix products that one segment of one row needs.

    A product of m x n and n x k matrices counts 2 m n k. Per layer: the projections to queries,
    keys and values and back, 4 x 2 T d HD; the feed-forward, 2 x 2 T d ffn_dim; local attention,
    scores and weighted sums, 2 x 2 HD for each pair of `count_window_pairs` with a full cache (what
    a mask hides is not needed). Then the logits, 2 T d vocab_size. Nothing is counted for memory,
    nor for softmax, norms and look-ups.
    """
    tokens, inner = config.segment_len, config.num_heads * config.head_dim
    num_cached = config.window if config.xl_cache else 0
    pairs = count_window_pairs(tokens, config.window, num_cached)
    projections = 4 * 2 * tokens * config.model_dim * inner
    feed_forward = 2 * 2 * tokens * config.model_dim * config.ffn_dim
    attention = 2 * 2 * pairs * inner
    logits = 2 * tokens * config.model_dim * config.vocab_size
    return config.num_layers * (projections + feed_forward + attention) + logits


def count_step_flops(config: ModelConfig) -> int:
    """Model FLOPs of forward and backward: three times the forward pass, as is usual.

    The backward pass of a product is two products of its size. Cached keys and values take no
    gradient, so that this is a little more than needed: 1% for the paper's 200M model.
    """
    return 3 * count_forward_flops(config)


def make_large_product(dim: int, dtype: torch.dtype) -> tuple[Callable[[], Tensor], int]:
    """A product of two dim x dim matrices into a buffer that is reused, and its FLOPs."""
    left, right = (torch.randn(dim, dim).to(dtype) for _ in range(2))
    buffer = torch.empty(dim, dim, dtype=dtype)
    return (lambda: torch.mm(left, right, out=buffer)), 2 * dim**3
