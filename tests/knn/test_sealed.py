"""Sealed blocks: which entries are in them, what is saved, and what the libraries do."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from memorizing.errors import StateError
from memorizing.index_settings import FaissIvfSettings
from memorizing.knn import SealedIndex
from memorizing.knn.blocks import BlockLibrary, KeyBlock
from memorizing.knn.sealed import list_stretches, plan_blocks
from tests.knn.ring import Ring, draw_keys

ROWS, HEADS, CAPACITY, DIM, BLOCK, K = 2, 3, 211, 17, 53, 7
SHAPE = (ROWS, HEADS, CAPACITY, DIM)
SAVED = ["faiss_ivf:block_len=53", "faiss_hnsw:block_len=53"]
SCANN_TREE = "scann:block_len=103,num_leaves=2,leaves_to_search=2"


class ArrayBlock(KeyBlock):
    """Keys in an array."""

    def __init__(self, keys: np.ndarray) -> None:
        self.keys = keys.copy()

    def search(
        self, queries: np.ndarray, num_candidates: int, wanted: range
    ) -> tuple[np.ndarray, np.ndarray]:
        scores = queries @ self.keys.T
        num_candidates += len(self.keys) - len(wanted)
        found = np.argsort(-scores, axis=1, kind="stable")[:, :num_candidates]
        return found, np.take_along_axis(scores, found, axis=1)

    def dump(self) -> dict[str, np.ndarray]:
        return {"numbers": np.arange(len(self.keys))}


class ArrayLibrary(BlockLibrary):
    """A library in a few lines, which counts what it builds and reads."""

    def __init__(self) -> None:
        self.built: list[int] = []
        self.num_read = 0

    def build(self, keys: np.ndarray, queries: np.ndarray | None) -> KeyBlock:
        self.built.append(len(keys))
        return ArrayBlock(keys)

    def restore(self, arrays: Mapping[str, np.ndarray], keys: np.ndarray) -> KeyBlock:
        self.num_read += 1
        assert arrays["numbers"].tolist() == list(range(len(keys)))
        return ArrayBlock(keys)


@pytest.fixture
def library() -> ArrayLibrary:
    return ArrayLibrary()


@pytest.fixture
def ring(library: ArrayLibrary) -> Ring:
    ring = Ring("exact", SHAPE)
    ring.index = SealedIndex(FaissIvfSettings(block_len=BLOCK), library)
    return ring


def make_ring(index: str, num_keys: int) -> Ring:
    pytest.importorskip(index.partition("_")[0].partition(":")[0])
    ring = Ring(index, SHAPE)
    ring.append(draw_keys(ROWS, HEADS, num_keys, DIM))
    return ring


def draw_queries(seed: int = 1) -> torch.Tensor:
    return draw_keys(ROWS, HEADS, 5, DIM, seed=seed)


@given(data=st.data(), capacity=st.integers(1, 60), count=st.integers(0, 300))
def test_blocks_and_stretches_are_the_living_entries_each_once(data, capacity: int, count: int):
    living = range(max(0, count - capacity), count)
    cuts = data.draw(st.lists(st.integers(living.start, living.stop), max_size=6).map(sorted))
    blocks = [
        range(*pair) for pair in zip(cuts[::2], cuts[1::2], strict=False) if len(set(pair)) > 1
    ]
    stretches = list_stretches(living, blocks, capacity)
    assert sorted([*sum(map(list, blocks), []), *sum(map(list, stretches), [])]) == list(living)
    for stretch in stretches:
        assert stretch.start % capacity + len(stretch) <= capacity, "consecutive slots"


@pytest.mark.parametrize(
    ("living", "sealed", "until", "due"),
    [
        (range(0, 52), [], 0, []),
        (range(0, 53), [], 0, [range(0, 53)]),
        (range(0, 54), [range(0, 53)], 53, []),
        (range(0, 160), [], 0, [range(0, 53), range(53, 106), range(106, 159)]),
        # Blocks begin at multiples of their length, whenever they are built.
        (range(10, 110), [range(53, 106)], 106, []),
        (range(1, 110), [], 0, [range(53, 106)]),
        (range(500, 583), [], 106, [range(530, 583)]),
        (range(500, 582), [], 106, []),
        # A long block: what came since, but for what shares a block with it.
        (range(10, 212), [range(0, 110)], 110, [range(159, 212)]),
        # It was dropped: the newest part of what it held is due, then the one before.
        (range(60, 212), [range(159, 212)], 212, [range(106, 159)]),
        (range(20, 212), [range(106, 159), range(159, 212)], 212, [range(53, 106)]),
    ],
)
def test_what_is_due_to_be_sealed(living, sealed, until, due):
    assert plan_blocks(living, sealed, until, BLOCK) == due


def test_a_block_is_built_when_its_entries_are_there_and_only_once(ring: Ring, library):
    ring.append(draw_keys(ROWS, HEADS, BLOCK - 1, DIM))
    assert library.built == []
    ring.append(draw_keys(ROWS, HEADS, 1, DIM, seed=2))
    assert library.built == [BLOCK] * ROWS * HEADS
    ring.append(draw_keys(ROWS, HEADS, BLOCK - 1, DIM, seed=3))
    ring.search(draw_queries(), K)
    assert len(library.built) == ROWS * HEADS


def test_a_memory_smaller_than_a_block_is_searched_exactly(library):
    ring = Ring("exact", SHAPE)
    ring.index = SealedIndex(FaissIvfSettings(block_len=CAPACITY + 1), library)
    ring.append(draw_keys(ROWS, HEADS, 3 * CAPACITY, DIM))
    assert ring.measure_recall(draw_queries(), K) == 1.0
    assert library.built == []


def test_sealing_makes_one_block_a_row_and_is_done_once(ring: Ring, library):
    ring.append(draw_keys(ROWS, HEADS, 2 * BLOCK + 1, DIM))
    library.built.clear()
    ring.index.seal(ring.stored)
    ring.index.seal(ring.stored)
    assert library.built == [2 * BLOCK + 1] * ROWS * HEADS
    ring.search(draw_queries(), K)


def test_a_block_serves_until_half_of_it_is_overwritten(ring: Ring, library):
    ring.append(draw_keys(ROWS, HEADS, CAPACITY, DIM))
    ring.index.seal(ring.stored)
    library.built.clear()
    half = CAPACITY // 2
    for num_new in (29, half - 29):
        ring.append(draw_keys(ROWS, HEADS, num_new, DIM, seed=num_new))
        assert ring.measure_recall(draw_queries(), K) > 0.98
    # A block of what came since; the one of all is there still.
    assert library.built == [BLOCK] * ROWS * HEADS
    for num_calls in range(4):
        library.built.clear()
        ring.append(draw_keys(1, HEADS, 1, DIM, seed=num_calls).expand(ROWS, -1, -1, -1))
        # The newest whole block of what was in the long one, then a block of what came since.
        assert len(library.built) == (ROWS * HEADS if num_calls < 2 else 0)
        assert ring.measure_recall(draw_queries(), K) == 1.0


def test_a_block_that_is_overwritten_in_part_is_not_saved(ring: Ring, library, tmp_path: Path):
    ring.append(draw_keys(ROWS, HEADS, CAPACITY, DIM))
    ring.index.seal(ring.stored)
    ring.append(draw_keys(ROWS, HEADS, 1, DIM, seed=1))
    ring.index.save(tmp_path, ring.stored)
    before = ring.search(draw_queries(), K)
    library.num_read = 0
    ring.index.load(tmp_path, ring.stored)
    assert library.num_read == 0
    after = ring.search(draw_queries(), K)
    assert torch.equal(before.slots, after.slots)


def test_resetting_a_row_leaves_the_blocks_of_the_others(ring: Ring, library):
    ring.append(draw_keys(ROWS, HEADS, 2 * BLOCK, DIM))
    before = ring.search(draw_queries(), K)
    library.built.clear()
    ring.reset(0)
    ring.append(draw_keys(ROWS, HEADS, BLOCK, DIM, seed=2), rows=[0])
    assert library.built == [BLOCK] * HEADS
    assert torch.equal(ring.search(draw_queries(), K).slots[1], before.slots[1])
    ring.append(draw_keys(ROWS, HEADS, BLOCK, DIM, seed=3), rows=[0])
    assert ring.measure_recall(draw_queries(), K) == 1.0


def test_hidden_entries_of_a_block_do_not_crowd_out_the_others(ring: Ring):
    pole = draw_queries()[0, 0, 0]
    keys = draw_keys(ROWS, HEADS, 2 * BLOCK, DIM)
    keys[:, :, -2 * K : -K] = 2 * pole
    keys[:, :, -K:] = 3 * pole
    ring.append(keys)
    num_hidden = torch.full((ROWS, 1), K)
    found = ring.search(pole.expand(ROWS, HEADS, 1, DIM), K, num_hidden)
    assert (found.slots >= 2 * BLOCK - 2 * K).all()


def test_a_key_that_is_not_finite_is_not_sealed(ring: Ring):
    keys = draw_keys(ROWS, HEADS, BLOCK, DIM)
    keys[1, 2, 11] = torch.nan
    with pytest.raises(StateError, match="entry 11 of row 1, head 2"):
        ring.append(keys)


def test_a_saved_block_is_read_and_not_built(ring: Ring, library, tmp_path: Path):
    ring.append(draw_keys(ROWS, HEADS, 3 * CAPACITY, DIM))
    before = ring.search(draw_queries(), K)
    num_built = len(library.built)
    ring.index.save(tmp_path, ring.stored)
    ring.index = SealedIndex(FaissIvfSettings(block_len=BLOCK), library)
    ring.index.load(tmp_path, ring.stored)
    assert torch.equal(ring.search(draw_queries(), K).slots, before.slots)
    assert len(library.built) == num_built
    assert library.num_read == 3 * ROWS * HEADS


def test_saving_again_leaves_only_what_is_named(ring: Ring, tmp_path: Path):
    ring.append(draw_keys(ROWS, HEADS, CAPACITY, DIM))
    (tmp_path / "notes.txt").write_text("mine")
    ring.index.save(tmp_path, ring.stored)
    first = {path.name for path in tmp_path.iterdir()}
    ring.append(draw_keys(ROWS, HEADS, CAPACITY, DIM, seed=2))
    ring.index.save(tmp_path, ring.stored)
    second = {path.name for path in tmp_path.iterdir()}
    assert first & second == {"notes.txt", "manifest.json", "index.json"}
    blocks = json.loads((tmp_path / "index.json").read_text(encoding="utf-8"))["blocks"]
    named = {f"{block['row']}-{block['entries'][0]}.safetensors" for block in blocks}
    assert second == {"notes.txt", "manifest.json", "index.json", *named}


def test_an_index_that_would_ignore_queries_refuses_them(ring: Ring):
    with pytest.raises(StateError, match="not trained on queries"):
        ring.index.observe_queries(draw_queries())
