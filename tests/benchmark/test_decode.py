"""What the benchmark of decoding times, says and refuses."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from memorizing.benchmark.decode import _make_arms, benchmark_decode
from memorizing.benchmark.indexes import ReplayingIndex
from memorizing.benchmark.preparing import fill_state
from memorizing.benchmark.recording import Recording
from memorizing.config import ModelConfig
from memorizing.errors import ConfigError
from memorizing.model import MemorizingTransformer
from memorizing.model.block import normalize

TINY = ModelConfig(
    vocab_size=29,
    num_layers=3,
    model_dim=10,
    num_heads=3,
    head_dim=5,
    ffn_dim=13,
    segment_len=7,
    window=11,
    memory_layers=(1, 2),
    capacity=17,
    num_neighbors=2,
)


def make_recording(num_heads: int = 2, num_entries: int = 47, head_dim: int = 5) -> Recording:
    keys = normalize(torch.randn(num_heads, num_entries, head_dim)).bfloat16()
    queries = normalize(torch.randn(num_heads, 23, head_dim)).bfloat16()
    return Recording(keys, queries, {"run": "somewhere"})


@pytest.mark.parametrize("recording", [None, make_recording()], ids=["random", "recorded"])
def test_a_token_is_compared_with_one_without_memory(recording: Recording | None) -> None:
    calls = []
    # More tokens than a segment has: it is decoded again.
    result = benchmark_decode(
        TINY,
        41,
        num_pairs=17,
        num_warmup=2,
        recording=recording,
        on_progress=lambda done, total: calls.append((done, total)),
    )
    assert calls[-1] == (19, 19)
    rows = result["rows"]
    assert [(row["name"], row["entries"]) for row in rows] == [
        ("no_memory", 0),
        ("memory", 41),
        ("search", 41),
    ]
    for row in rows:
        assert row["compared_with"] == "no_memory"
        assert min(row["seconds"], row["ratio"]) > 0
    assert 0.9 <= rows[1]["recall"] <= 1
    assert rows[1]["build_s"] >= 0
    if recording is None:
        assert result["recorded"] is None
    else:
        expected = {"run": "somewhere", "num_heads": 2, "num_entries": 47, "num_queries": 23}
        assert result["recorded"] == expected


def test_a_model_in_bf16_casts_nothing_and_gives_logits_near_those_of_fp32() -> None:
    torch.manual_seed(0)
    model = MemorizingTransformer(TINY).eval()
    tokens = torch.randint(29, (1, 7))
    with torch.no_grad():
        expected = model(tokens, model.init_state(1)).logits
        model.to(torch.bfloat16).compute_dtype = torch.bfloat16
        logits = model(tokens, model.init_state(1)).logits
    assert {p.dtype for p in model.parameters()} == {logits.dtype} == {torch.bfloat16}
    # bf16 has 8 bits; errors of some layers of rounding add up.
    assert float((logits - expected).abs().max()) < 0.05 * float(expected.abs().max())


def test_decoding_goes_round_in_one_segment_and_writes_nothing() -> None:
    torch.manual_seed(0)
    model = MemorizingTransformer(TINY).eval()
    tokens = torch.randint(29, (1, 7))
    states = {"no_memory": fill_state(model, tokens, 0), "memory": fill_state(model, tokens, 17)}
    memories = states["memory"].memories.values()
    before = [memory.num_appended.clone() for memory in memories]
    arms = _make_arms(model, tokens, states, torch.randn(3, 5, 5))
    for _ in range(2 * 7 + 1):
        for decode in arms.values():
            decode()
    indexes = [memory.index for memory in memories]
    assert all(isinstance(index, ReplayingIndex) for index in indexes)
    assert [index.num_replayed for index in indexes if isinstance(index, ReplayingIndex)] == [
        15
    ] * 2
    for memory, appended in zip(memories, before, strict=True):
        assert torch.equal(memory.num_appended, appended)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"entries": 1}, "at least num_neighbors = 2"),
        ({"recording": make_recording(num_entries=40)}, "has 40 entries of 5 dimensions"),
        ({"recording": make_recording(head_dim=3)}, "model.head_dim = 3"),
        ({"precision": "fp16"}, "'bf16' and 'fp32'"),
        ({"index": "exactly"}, "did you mean 'exact'"),
    ],
)
def test_what_cannot_be_timed_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        benchmark_decode(TINY, **{"entries": 41, **settings})
