"""What the benchmark of a training step times, says and refuses."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from memorizing.benchmark import benchmark_step
from memorizing.benchmark.step import _check_search, _fill_state
from memorizing.config import ModelConfig
from memorizing.errors import ConfigError, MemorizingError
from memorizing.model import MemorizingTransformer

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


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_every_memory_is_compared_with_the_step_without(precision: str) -> None:
    calls = []
    result = benchmark_step(
        TINY,
        (19, 41),
        num_pairs=3,
        num_warmup=1,
        precision=precision,
        on_progress=lambda done, total: calls.append((done, total)),
    )
    assert calls == [(1, 4), (2, 4), (3, 4), (4, 4)]
    rows = result["rows"]
    assert [(row["name"], row["entries"]) for row in rows] == [
        ("no_memory", 0),
        ("memory", 19),
        ("memory", 41),
    ]
    for row in rows:
        assert row["compared_with"] == "no_memory"
        assert row["seconds"] > 0
        assert row["ratio"] > 0
    assert (rows[0]["ratio"], rows[0]["added_s"]) == (1, 0)
    assert (result["precision"], result["num_pairs"], result["segment_len"]) == (precision, 3, 7)


@pytest.mark.parametrize("capacity", [0, 3, 19])
def test_timed_steps_find_the_cache_and_the_memory_full(capacity: int) -> None:
    model = MemorizingTransformer(TINY)
    tokens = torch.randint(29, (1, 7))
    state = _fill_state(model, tokens, capacity)
    for _ in range(2):
        assert [cache.keys.shape[2] for cache in state.xl_caches] == [11, 11]
        assert [m.size.tolist() for m in state.memories.values()] == [[capacity]] * bool(capacity)
        assert state.position % 7 == 0
        state = model(tokens, state).state.commit()


def test_no_speed_is_reported_for_a_search_that_misses_entries() -> None:
    state = _fill_state(MemorizingTransformer(TINY), torch.randint(29, (1, 7)), 64)
    _check_search([state], TINY)
    # The search now sees the first 31 slots only; the sort that checks it sees all.
    state.memories[1].num_appended.fill_(31)
    with pytest.raises(MemorizingError, match="no speed is reported"):
        _check_search([state], TINY)


@pytest.mark.parametrize(
    ("model", "settings", "message"),
    [
        ({"memory_layers": ()}, {}, "no memory layer"),
        ({}, {"entries": (2,)}, "at least num_neighbors = 3"),
        ({}, {"entries": ()}, "at least one capacity"),
        ({}, {"entries": (0, 19)}, "at least one capacity"),
        ({}, {"num_pairs": 0}, "at least one pair"),
        ({}, {"precision": "fp16"}, "'bf16' and 'fp32'"),
    ],
)
def test_what_cannot_be_timed_is_refused(
    model: dict[str, Any], settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        benchmark_step(replace(TINY, **model), **{"entries": (19,), **settings})
