"""What the benchmarks measure, tiny. Sizes are different primes."""

from __future__ import annotations

import pytest
import torch

from memorizing.benchmark import Recording


@pytest.fixture
def recording() -> Recording:
    generator = torch.Generator().manual_seed(1)
    keys = torch.randn(2, 101, 13, generator=generator).bfloat16()
    queries = torch.randn(2, 23, 13, generator=generator).bfloat16()
    return Recording(keys, queries, {"run": "runs/small", "layer": 1})
