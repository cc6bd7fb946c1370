"""Sealed blocks of the libraries."""

from __future__ import annotations

import multiprocessing

import pytest
import torch

from memorizing.knn import Neighbors, make_index
from tests.knn.ring import Ring, draw_keys
from tests.knn.test_sealed import (
    BLOCK,
    CAPACITY,
    DIM,
    HEADS,
    ROWS,
    SAVED,
    K,
    draw_queries,
    make_ring,
)


@pytest.mark.parametrize("index", [*SAVED, "faiss_flat:block_len=53", "scann:block_len=103"])
def test_a_block_that_is_overwritten_in_part_gives_its_nearest_living_entries(index: str):
    ring = make_ring(index, CAPACITY)
    pole = draw_queries()[:, :, :1]
    keys = draw_keys(ROWS, HEADS, CAPACITY, DIM, seed=5)
    keys[:, :, : CAPACITY // 2] += 3 * pole  # those that will be overwritten are the nearest
    ring.append(keys)
    ring.index.seal(ring.stored)
    for num_new in (29, 41, 31):
        ring.append(draw_keys(ROWS, HEADS, num_new, DIM, seed=num_new))
        assert ring.measure_recall(pole + 0.1 * draw_queries(), K) > 0.95


@pytest.mark.parametrize("index", [*SAVED, "scann:block_len=103,num_leaves=2,leaves_to_search=1"])
def test_an_index_made_anew_from_the_keys_finds_what_the_old_one_found(index: str):
    ring = make_ring(index, 17)
    torch.manual_seed(0)
    for step in range(9):
        ring.append(draw_keys(ROWS, HEADS, 59, DIM, seed=step), rows=[[0], [0, 1]][step % 2])
        made = make_index(ring.index.settings)
        made.append(ring.stored)
        mine, other = (one.search(draw_queries(), ring.stored, K) for one in (made, ring.index))
        assert torch.equal(mine.slots, other.slots)
        assert torch.equal(mine.scores, other.scores)


@pytest.mark.parametrize("index", [SAVED[0], "scann:block_len=53"])
def test_a_forked_process_searches_and_builds(index: str):
    ring = make_ring(index, 2 * BLOCK)
    expected = _search_heads_side_by_side(ring)
    process = multiprocessing.get_context("fork").Process(
        target=_search_and_build, args=(ring, expected.slots)
    )
    process.start()
    process.join(20)
    is_hanging = process.is_alive()
    if is_hanging:
        process.kill()
    assert not is_hanging
    assert process.exitcode == 0


def _search_heads_side_by_side(ring: Ring) -> Neighbors:
    # torch's own threads do not survive a fork, so that it must not have any.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "get_num_threads", lambda: len(draw_queries()[0, 0]) + 1)
        return ring.search(draw_queries(), K)


def _search_and_build(ring: Ring, expected: torch.Tensor) -> None:
    # Threads of OpenMP, which are torch's and not ours, do not survive a fork.
    torch.set_num_threads(1)
    assert torch.equal(_search_heads_side_by_side(ring).slots, expected)
    ring.append(draw_keys(ROWS, HEADS, BLOCK, DIM, seed=2))
    ring.search(draw_queries(), K)
