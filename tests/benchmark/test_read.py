"""What the benchmark of reading times, says and refuses."""

from __future__ import annotations

import pytest

from memorizing.benchmark.read import benchmark_read
from memorizing.config import ModelConfig
from memorizing.errors import ConfigError

TINY = ModelConfig(
    vocab_size=29,
    num_layers=2,
    model_dim=10,
    num_heads=2,
    head_dim=5,
    ffn_dim=13,
    segment_len=7,
    window=11,
    memory_layers=(1,),
    capacity=17,
    num_neighbors=3,
)


def test_searched_and_closed_memories_are_compared_with_none() -> None:
    calls = []
    result = benchmark_read(
        TINY,
        (41, 19),
        num_pairs=2,
        num_warmup=1,
        on_progress=lambda done, total: calls.append((done, total)),
    )
    assert calls == [(1, 3), (2, 3), (3, 3)]
    assert [(row["name"], row["entries"]) for row in result["rows"]] == [
        ("no_memory", 0),
        ("closed", 41),
        ("searched", 41),
        ("closed", 19),
        ("searched", 19),
    ]
    for row in result["rows"]:
        assert row["compared_with"] == "no_memory"
        assert row["tokens_per_s"] == pytest.approx(7 / row["seconds"])
        assert ("recall" in row) == (row["name"] == "searched")


def test_what_cannot_be_timed_is_refused() -> None:
    with pytest.raises(ConfigError, match="at least num_neighbors = 3"):
        benchmark_read(TINY, (2,))
