"""Indexes are built and asked before they are timed."""

from __future__ import annotations

import pytest
import torch

from memorizing.benchmark.decode import benchmark_decode
from memorizing.benchmark.indexes import ReplayingIndex
from memorizing.benchmark.preparing import fill_memory
from memorizing.benchmark.recording import Recording
from memorizing.errors import ConfigError
from memorizing.memory import Memory
from tests.benchmark.test_decode import TINY, make_recording


@pytest.mark.parametrize("index", ["faiss_hnsw", "faiss_ivf:train_on_queries=true"])
def test_an_index_of_blocks_is_built_of_everything_before_it_is_timed(index: str) -> None:
    pytest.importorskip("faiss")
    result = benchmark_decode(TINY, 173, num_pairs=3, num_warmup=1, index=index)
    memory = result["rows"][1]
    assert memory["build_s"] > 0
    assert 0.5 < memory["recall"] <= 1
    assert result["index"] == index


def test_an_index_trained_on_queries_needs_others_than_those_timed() -> None:
    pytest.importorskip("faiss")
    recording = make_recording()
    only = Recording(recording.keys, recording.queries[:, :1], {})
    with pytest.raises(ConfigError, match="record more queries"):
        benchmark_decode(TINY, 41, index="faiss_ivf:train_on_queries=true", recording=only)


def test_given_queries_are_searched_for_one_after_the_other_in_a_circle() -> None:
    memory = Memory(1, 2, 13, 5, torch.float32)
    fill_memory(memory, 13)
    queries = torch.randn(2, 3, 5)
    expected = memory.index.search(queries.unsqueeze(0), memory.stored_keys, 4)
    replaying = ReplayingIndex(memory.index, queries)
    asked = torch.randn(1, 2, 1, 5)
    for turn in range(7):
        found = replaying.search(asked, memory.stored_keys, 4)
        assert torch.equal(found.slots[:, :, 0], expected.slots[:, :, turn % 3])
