"""What every benchmark of a model with memory can be asked for."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from memorizing.config import ModelConfig, check_capacity
from memorizing.errors import ConfigError
from memorizing.knn import is_emulated

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
"""Precisions, by name."""

DEFAULT_PRECISION = "fp32" if is_emulated(torch.bfloat16) else "bf16"
"""bf16, but for processors on which torch emulates it."""


def check_arguments(
    config: ModelConfig, entries: Sequence[int], num_pairs: int, precision: str
) -> None:
    """Refuse what cannot be timed.

    Raises:
        ConfigError: no memory layer, no entries, a capacity that cannot be, no pair, or another
            precision than `bf16` and `fp32`.
    """
    if not config.memory_layers:
        raise ConfigError(
            "the model has no memory layer to time; choose a recipe with model.memory_layers"
        )
    if not entries or min(entries) < 1 or num_pairs < 1:
        raise ConfigError(
            f"entries are {list(entries)} and num_pairs is {num_pairs}; give at least one capacity "
            "above 0 (the model without memory is always timed) and at least one pair"
        )
    for capacity in entries:
        check_capacity(capacity, config.num_neighbors)
    if precision not in DTYPES:
        raise ConfigError(f"precision is {precision!r}; allowed: 'bf16' and 'fp32'")
