"""What is timed is full before: caches, memories, given keys."""

from __future__ import annotations

import pytest
import torch

from memorizing.benchmark.preparing import fill_memory, fill_state
from memorizing.memory import Memory
from memorizing.model import MemorizingTransformer
from tests.benchmark.test_step import TINY


@pytest.mark.parametrize("capacity", [0, 3, 19])
def test_timed_steps_find_the_cache_and_the_memory_full(capacity: int) -> None:
    model = MemorizingTransformer(TINY)
    tokens = torch.randint(29, (1, 7))
    state = fill_state(model, tokens, capacity)
    for _ in range(2):
        assert [cache.keys.shape[2] for cache in state.xl_caches] == [11, 11]
        assert [m.size.tolist() for m in state.memories.values()] == [[capacity]] * bool(capacity)
        assert state.position % 7 == 0
        state = model(tokens, state).state.commit()


@pytest.mark.parametrize("num_entries", [12, 13, 14, 31])
def test_given_keys_are_stored_in_their_order_and_repeated_over_heads(num_entries: int) -> None:
    memory = Memory(1, 3, 13, 5, torch.float32)
    keys = torch.randn(2, 13, 5)
    fill_memory(memory, num_entries, keys)
    for entry in range(max(0, num_entries - 13), num_entries):
        stored = memory.keys[0, :, entry % 13]
        assert torch.equal(stored, keys[[0, 1, 0], entry % 13])
    assert memory.num_appended.tolist() == [num_entries]
