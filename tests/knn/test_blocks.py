"""What every library behind `SealedIndex` does alike."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from memorizing.errors import IndexUnavailableError, StateError
from memorizing.index_settings import parse_index
from memorizing.knn import make_index
from tests.knn.ring import draw_keys
from tests.knn.test_sealed import (
    CAPACITY,
    DIM,
    HEADS,
    ROWS,
    SAVED,
    SCANN_TREE,
    K,
    draw_queries,
    make_ring,
)


@pytest.mark.parametrize("index", [SAVED[1], "scann:block_len=53"])
@pytest.mark.parametrize("num_keys", [1, 2, 3, 17, 41])
def test_a_block_of_few_keys_is_complete(index: str, num_keys: int, tmp_path: Path):
    ring = make_ring(index, num_keys)
    ring.index.seal(ring.stored)
    assert ring.measure_recall(draw_queries(), K) == 1.0


@pytest.mark.parametrize(
    "index",
    [
        "scann:block_len=103,num_leaves=2,leaves_to_search=1",
        "faiss_ivf:block_len=103,num_lists=2,num_probes=1",
    ],
)
def test_what_a_library_did_not_look_through_is_found_when_all_is_asked_for(index: str):
    ring = make_ring(index, CAPACITY)
    assert ring.search(draw_queries(), CAPACITY).valid.all()
    assert ring.search(draw_queries(), CAPACITY // 2).valid.all()


def test_lists_of_8_bits_find_the_nearest_and_are_read_back_as_they_were(tmp_path: Path):
    pytest.importorskip("faiss", reason="needs the extra faiss")
    lists = "faiss_ivf:block_len=103,num_lists=3,num_probes=3,oversample=4"
    ring = make_ring(f"{lists},num_bits=8", CAPACITY)
    found = ring.search(draw_queries(), K)
    assert ring.measure_recall(draw_queries(), K) == 1.0
    ring.index.save(tmp_path, ring.stored)
    ring.index.load(tmp_path, ring.stored)
    again = ring.search(draw_queries(), K)
    assert torch.equal(again.slots, found.slots)
    assert torch.equal(again.scores, found.scores)
    with pytest.raises(StateError, match="open it with the settings it was saved with"):
        make_ring(lists, CAPACITY).index.load(tmp_path, ring.stored)


@pytest.mark.parametrize(
    "index", ["faiss_flat", "faiss_int8", "faiss_ivf", "faiss_hnsw", SCANN_TREE]
)
def test_nothing_is_printed(index: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    ring = make_ring(index, 149)
    for num_keys in (2, 47):
        ring.index.seal(ring.stored)
        ring.append(draw_keys(ROWS, HEADS, num_keys, DIM, seed=2))
    ring.index.save(tmp_path, ring.stored)
    ring.index.load(tmp_path, ring.stored)
    ring.search(draw_queries(), K)
    sys.stdout.flush()
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(("package", "index"), [("faiss", "faiss_ivf"), ("scann", "scann")])
def test_a_missing_package_is_named_with_its_command(package: str, index: str, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(IndexUnavailableError, match=rf"pip install 'memorizing\[{package}\]'"):
        make_index(parse_index(index))
