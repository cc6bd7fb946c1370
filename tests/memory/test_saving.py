"""A memory with its index, written to a folder and opened again."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from memorizing.errors import StateError
from memorizing.index_settings import parse_index
from memorizing.memory import Memory, open_memory_folder, save_memory

INDEXES = ["exact", "int8", "faiss_flat:block_len=13", "faiss_hnsw:block_len=13"]
QUERIES = torch.randn(2, 3, 5, 11, generator=torch.Generator().manual_seed(1))


def make_memory(index: str, seed: int = 0) -> Memory:
    if index.startswith("faiss"):
        pytest.importorskip("faiss")
    torch.manual_seed(seed)
    memory = Memory(2, 3, 41, 11, index=parse_index(index))
    for _ in range(3):
        memory.append(torch.randn(2, 3, 17, 11), torch.randn(2, 3, 17, 11))
    return memory


def assert_alike(mine: Memory, other: Memory) -> None:
    found, expected = (memory.retrieve(QUERIES, 7) for memory in (mine, other))
    assert torch.equal(found.neighbors.slots, expected.neighbors.slots)
    assert torch.equal(found.fetch_values(), expected.fetch_values())


@pytest.mark.parametrize("index", INDEXES)
def test_a_memory_is_opened_with_its_index_and_goes_on_alike(index: str, tmp_path: Path) -> None:
    memory = make_memory(index)
    save_memory(memory, tmp_path / "deep" / "memory")
    opened = open_memory_folder(tmp_path / "deep" / "memory")
    assert opened.index.settings == memory.index.settings
    assert opened.num_appended.tolist() == [51, 51]
    assert_alike(opened, memory)
    entries = torch.randn(2, 3, 19, 11)
    for one in (opened, memory):
        one.append(entries, entries)
    assert_alike(opened, memory)


def test_a_memory_can_be_opened_with_another_index(tmp_path: Path) -> None:
    memory = make_memory("int8")
    save_memory(memory, tmp_path)
    opened = open_memory_folder(tmp_path, parse_index("exact:rescore=true"))
    assert str(opened.index.settings) == "exact:rescore=true"
    assert_alike(opened, memory)


def test_saving_again_replaces_what_was_there(tmp_path: Path) -> None:
    save_memory(make_memory("faiss_hnsw:block_len=13"), tmp_path)
    newer = make_memory("faiss_hnsw:block_len=13", seed=1)
    save_memory(newer, tmp_path)
    assert_alike(open_memory_folder(tmp_path), newer)


def test_an_index_of_other_keys_is_refused(tmp_path: Path) -> None:
    save_memory(make_memory("faiss_hnsw:block_len=13"), tmp_path / "one")
    save_memory(make_memory("faiss_hnsw:block_len=13", seed=1), tmp_path / "other")
    (tmp_path / "one" / "memory.safetensors").replace(tmp_path / "other" / "memory.safetensors")
    with pytest.raises(StateError):
        open_memory_folder(tmp_path / "other")


def test_what_is_no_memory_or_damaged_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StateError, match="holds no memory"):
        open_memory_folder(tmp_path)
    save_memory(make_memory("exact"), tmp_path)
    path = tmp_path / "memory.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(StateError, match="damaged"):
        open_memory_folder(tmp_path)
