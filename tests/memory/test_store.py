"""The ring against a deque, through wrap-arounds and resets of single rows."""

from __future__ import annotations

import copy
import pickle
from collections import deque

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from memorizing.errors import ConfigError, StateError
from memorizing.index_settings import parse_index
from memorizing.knn import make_index
from memorizing.memory import Memory

ROWS, HEADS, DIM = 3, 2, 5


class RingAgainstDeque(RuleBasedStateMachine):
    """Eviction is first in, first out at any capacity and any length of segments."""

    @initialize(capacity=st.integers(1, 13))
    def start(self, capacity: int) -> None:
        self.memory = Memory(ROWS, HEADS, capacity, DIM, torch.float32, keep_tokens=True)
        self.deques: list[deque[float]] = [deque(maxlen=capacity) for _ in range(ROWS)]
        self.next_entry = 0

    @rule(length=st.integers(0, 31), data=st.data())
    def append(self, length: int, data: st.DataObject) -> None:
        mask = data.draw(st.lists(st.booleans(), min_size=ROWS * length, max_size=ROWS * length))
        valid = torch.tensor(mask, dtype=torch.bool).view(ROWS, length)
        entries = (
            torch.arange(self.next_entry, self.next_entry + ROWS * length)
            .float()
            .view(ROWS, length)
        )
        self.next_entry += ROWS * length
        keys = entries.view(ROWS, 1, length, 1).expand(ROWS, HEADS, length, DIM)
        self.memory.append(keys, keys + 0.5, valid, entries.long() + 7)
        for row in range(ROWS):
            self.deques[row].extend(entries[row, valid[row]].tolist())

    @rule(rows=st.lists(st.booleans(), min_size=ROWS, max_size=ROWS))
    def reset(self, rows: list[bool]) -> None:
        self.memory.reset(torch.tensor(rows))
        for row, chosen in enumerate(rows):
            if chosen:
                self.deques[row].clear()

    @invariant()
    def ring_holds_what_the_deque_holds(self) -> None:
        if not hasattr(self, "memory"):
            return
        for row, expected in enumerate(self.deques):
            size = int(self.memory.size[row])
            assert size == len(expected)
            slots = torch.arange(size)
            positions = self.memory.compute_positions(
                slots.view(1, 1, 1, -1).expand(ROWS, 1, 1, -1)
            )[row, 0, 0]
            in_order = positions.argsort()
            for head in range(HEADS):
                keys, values = (
                    self.memory.keys[row, head, :size, 0],
                    self.memory.values[row, head, :size, 0],
                )
                assert keys[in_order].tolist() == list(expected)
                assert torch.equal(values, keys + 0.5)
            tokens = self.memory.tokens[row, :size]
            assert tokens[in_order].tolist() == [int(entry) + 7 for entry in expected]
            newest = int(self.memory.num_appended[row]) - 1
            assert positions.sort().values.tolist() == list(range(newest - size + 1, newest + 1))


RingAgainstDeque.TestCase.settings = settings(
    max_examples=30, stateful_step_count=20, deadline=None
)
test_the_ring_is_first_in_first_out = RingAgainstDeque.TestCase


@pytest.mark.parametrize("capacity", [4, 5, 6, 59, 60, 61])
def test_each_entry_is_found_again_with_its_own_value(capacity: int) -> None:
    torch.manual_seed(0)
    memory = Memory(2, 3, capacity, 7, torch.float32)
    keys = torch.nn.functional.normalize(torch.randn(2, 3, 60, 7), dim=-1)
    values = torch.randn(2, 3, 60, 7)
    for start in range(0, 60, 13):
        memory.append(keys[:, :, start : start + 13], values[:, :, start : start + 13])
    kept = slice(max(0, 60 - capacity), 60)
    found = memory.retrieve(keys[:, :, kept], 1)
    torch.testing.assert_close(found.fetch_keys().squeeze(3), keys[:, :, kept])
    torch.testing.assert_close(found.fetch_values().squeeze(3), values[:, :, kept])
    positions = memory.compute_positions(found.neighbors.slots)
    assert torch.equal(positions[0, 0, :, 0], torch.arange(60)[kept])


def test_resetting_one_row_leaves_the_others() -> None:
    memory = Memory(3, 2, 11, 5, torch.float32)
    entries = torch.randn(3, 2, 7, 5)
    memory.append(entries, entries)
    memory.reset(torch.tensor([False, True, False]))
    assert memory.size.tolist() == [7, 0, 7]
    assert torch.equal(memory.keys[2, :, :7], entries[2])
    found = memory.retrieve(torch.randn(3, 2, 1, 5), 3)
    assert found.neighbors.valid.flatten(1).any(1).tolist() == [True, False, True]


def test_stored_entries_take_no_gradient_and_are_not_the_callers_tensors() -> None:
    memory = Memory(1, 1, 7, 3, torch.float32)
    keys = torch.randn(1, 1, 4, 3, requires_grad=True)
    memory.append(keys, keys)
    stored = memory.keys.clone()
    assert not memory.keys.requires_grad
    with torch.no_grad():
        keys.zero_()
    assert torch.equal(memory.keys, stored)
    found = memory.retrieve(torch.randn(1, 1, 2, 3, requires_grad=True), 2)
    assert not found.fetch_keys().requires_grad


def test_an_entry_of_another_shape_is_refused() -> None:
    memory = Memory(2, 3, 7, 5)
    for shape in ((2, 1, 4, 5), (2, 3, 4, 1), (2, 3, 5)):
        with pytest.raises(StateError, match="rows, heads, n, head_dim"):
            memory.append(torch.zeros(shape), torch.zeros(shape))
    entries = torch.zeros(2, 3, 4, 5)
    with pytest.raises(StateError, match="by a mask"):
        memory.append(entries, entries, torch.ones(2, 3, dtype=torch.bool))
    assert memory.size.tolist() == [0, 0]


def test_tokens_are_found_with_the_values_that_they_are_of() -> None:
    torch.manual_seed(0)
    memory = Memory(2, 3, 29, 5, torch.float32, keep_tokens=True)
    keys, values = torch.randn(2, 2, 3, 29, 5)
    tokens = torch.randint(97, (2, 29))
    memory.append(keys, values, None, tokens)
    of_value = {tuple(values[row, :, e, 0].tolist()): (row, e) for row in (0, 1) for e in range(29)}
    for options in ({}, {"donor_rows": torch.tensor([1, 0])}, {"value_seed": 3}):
        found = memory.retrieve(torch.randn(2, 3, 7, 5), 4, **options)
        assert found.tokens.shape == found.neighbors.slots.shape
        for head in range(3):
            first = {key[head]: place for key, place in of_value.items()}
            seen = found.fetch_values()[:, head, :, :, 0].flatten().tolist()
            expected = [int(tokens[first[value]]) for value in seen]
            assert found.tokens[:, head].flatten().tolist() == expected


@pytest.mark.parametrize(
    ("keeps", "tokens", "message"),
    [
        (True, None, r"of shape None; this memory takes \(2, 4\)"),
        (True, torch.zeros(2, 3), r"of shape \(2, 3\); this memory takes \(2, 4\)"),
        (False, torch.zeros(2, 4), r"this memory takes none"),
    ],
)
def test_tokens_are_given_where_they_are_kept(
    keeps: bool, tokens: torch.Tensor | None, message: str
) -> None:
    memory, entries = Memory(2, 3, 7, 5, keep_tokens=keeps), torch.zeros(2, 3, 4, 5)
    with pytest.raises(StateError, match=message):
        memory.append(entries, entries, None, tokens)
    assert memory.size.tolist() == [0, 0]


def test_only_a_mask_over_the_rows_resets() -> None:
    memory = Memory(2, 3, 7, 5)
    for rows in (torch.tensor([1]), torch.tensor([1, 0]), torch.tensor([True, False, True])):
        with pytest.raises(StateError, match="a bool per row"):
            memory.reset(rows)


@pytest.mark.parametrize("index", ["int8", "faiss_flat:block_len=13", "buckets"])
def test_every_change_of_a_memory_reaches_its_index(index: str) -> None:
    torch.manual_seed(0)
    if index.startswith("faiss"):
        pytest.importorskip("faiss")
    settings = parse_index(index)
    queries = torch.randn(2, 3, 5, 11)
    entries = torch.randn(2, 3, 4, 59, 11)

    def compare(memory: Memory) -> None:
        """With a memory that was made in one go of the same entries, and searched exactly."""
        exact = make_index(parse_index("exact"))
        found = memory.retrieve(queries[: memory.num_rows], 7).neighbors
        expected = exact.search(queries[: memory.num_rows], memory.stored_keys, 7)
        torch.testing.assert_close(found.scores, expected.scores)

    memory = Memory(2, 3, 41, 11, torch.float32, index=settings)
    memory.append(entries[:, :, 0], entries[:, :, 0])
    compare(memory)
    memory.reset(torch.tensor([False, True]))
    memory.append(entries[:, :, 1, :17], entries[:, :, 1, :17])
    compare(memory)
    memory.seal()
    compare(memory)
    compare(memory.select_rows(torch.tensor([1, 0])))
    compare(copy.deepcopy(memory))
    compare(pickle.loads(pickle.dumps(memory)))
    other = Memory(2, 3, 41, 11, torch.float32, index=settings)
    other.append(entries[:, :, 2], entries[:, :, 2])
    other.load_state_dict(memory.state_dict())
    compare(other)


def test_what_is_not_finite_in_a_document_is_gone_with_it() -> None:
    memory = Memory(1, 2, 5, 3, torch.float32)
    memory.append(torch.full((1, 2, 5, 3), torch.inf), torch.full((1, 2, 5, 3), torch.nan))
    memory.reset(torch.tensor([True]))
    found = memory.retrieve(torch.randn(1, 2, 4, 3), 2)
    assert not found.neighbors.valid.any()
    assert found.fetch_keys().isfinite().all()
    assert found.fetch_values().isfinite().all()


def test_a_memory_without_slots_is_refused() -> None:
    with pytest.raises(ConfigError, match="1 or more"):
        Memory(2, 3, 0, 5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_an_entry_comes_back_rounded_once_to_the_dtype_of_the_memory(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    memory = Memory(1, 2, 7, 5, dtype)
    keys, values = torch.nn.functional.normalize(torch.randn(2, 1, 2, 11, 5), dim=-1)
    memory.append(keys, values)
    found = memory.retrieve(keys[:, :, 4:], 1)
    assert torch.equal(found.fetch_keys().squeeze(3), keys[:, :, 4:].to(dtype))
    assert torch.equal(found.fetch_values().squeeze(3), values[:, :, 4:].to(dtype))


def test_a_memory_of_another_dtype_is_not_loaded_by_halves() -> None:
    memory, other = Memory(1, 1, 7, 3), Memory(1, 1, 7, 3)
    entries = torch.randn(1, 1, 5, 3)
    other.append(entries, entries)
    tensors = other.state_dict() | {"values": other.values.float()}
    with pytest.raises(StateError, match="memory values is"):
        memory.load_state_dict(tensors)
    assert not memory.keys.any()


def test_a_restored_memory_continues_as_the_saved_one() -> None:
    torch.manual_seed(0)
    first, second = Memory(2, 1, 7, 3), Memory(2, 1, 7, 3)
    entries = torch.randn(2, 1, 10, 3)
    first.append(entries, entries)
    second.load_state_dict({name: t.clone() for name, t in first.state_dict().items()})
    for memory in (first, second):
        memory.append(entries[:, :, :4], entries[:, :, :4])
    assert torch.equal(first.keys, second.keys)
    assert first.num_appended.tolist() == second.num_appended.tolist() == [14, 14]
