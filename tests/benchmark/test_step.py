"""What the benchmark of a training step times, says and refuses."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from memorizing.benchmark.preparing import fill_memory, fill_state
from memorizing.benchmark.step import benchmark_step
from memorizing.benchmark.verification import check_memory, check_state
from memorizing.config import ModelConfig
from memorizing.errors import ConfigError, MemorizingError
from memorizing.memory import Memory
from memorizing.model import MemorizingTransformer
from memorizing.model.block import normalize

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
    pointer=True,
)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_every_memory_is_compared_with_the_step_without(precision: str) -> None:
    calls = []
    result = benchmark_step(
        TINY,
        (41, 19),
        num_pairs=3,
        num_warmup=1,
        precision=precision,
        large_dim=31,
        on_progress=lambda done, total: calls.append((done, total)),
    )
    assert calls == [(1, 4), (2, 4), (3, 4), (4, 4)]
    rows = result["rows"]
    assert [(row["name"], row["entries"]) for row in rows] == [
        ("no_memory", 0),
        ("memory", 41),
        ("memory", 19),
    ]
    for row in rows:
        assert row["compared_with"] == "no_memory"
        assert min(row["seconds"], row["ratio"]) > 0
    assert (rows[0]["ratio"], rows[0]["added_s"]) == (1, 0)
    for row in rows[1:]:
        assert min(row["product_s"], row["append_s"], row["append_ratio"]) > 0
        assert 0.9 <= row["recall"] <= 1
    assert rows[2]["append_ratio"] == 1  # the fewest entries are what the others are compared with
    assert (result["precision"], result["num_pairs"], result["segment_len"]) == (precision, 3, 7)
    assert {"processor", "threads", "versions", "commit"} <= set(result)


def test_the_limit_is_the_flops_of_a_step_at_the_speed_of_the_large_product() -> None:
    result = benchmark_step(TINY, (19,), num_pairs=1, num_warmup=1, large_dim=31)
    limit = result["limit"]
    speed = limit["product_tflops_per_s"] * 1e12
    assert limit["limit_s"] == pytest.approx(limit["step_flops"] / speed)
    # With one pair the medians are those of the pair itself.
    expected = limit["limit_s"] / result["rows"][0]["seconds"]
    assert limit["share_of_limit"] == pytest.approx(expected)


def test_no_speed_is_reported_for_a_search_that_misses_entries() -> None:
    torch.manual_seed(0)
    state = fill_state(MemorizingTransformer(TINY), torch.randint(29, (1, 7)), 64)
    assert check_state(state, TINY) > 0.9
    # The search now sees the first 31 slots only; the sort that checks it sees all.
    state.memories[1].num_appended.fill_(31)
    with pytest.raises(MemorizingError, match="no speed is reported"):
        check_state(state, TINY)


def test_recall_of_exact_search_among_fp32_keys_is_1() -> None:
    memory = Memory(1, 3, 43, 5, torch.float32)
    fill_memory(memory, 43)
    assert check_memory(memory, normalize(torch.randn(3, 11, 5)), 7) == 1


@pytest.mark.parametrize(
    ("model", "settings", "message"),
    [
        ({"memory_layers": ()}, {}, "no memory layer"),
        ({}, {"entries": (2,)}, "at least num_neighbors = 3"),
        ({}, {"entries": ()}, "at least one capacity"),
        ({}, {"entries": (0, 19)}, "at least one capacity"),
        ({}, {"num_pairs": 0}, "at least one pair"),
        ({}, {"precision": "fp16"}, "'bf16' and 'fp32'"),
        ({}, {"index": "exactly"}, "did you mean 'exact'"),
    ],
)
def test_what_cannot_be_timed_is_refused(
    model: dict[str, Any], settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        benchmark_step(replace(TINY, **model), **{"entries": (19,), **settings})
