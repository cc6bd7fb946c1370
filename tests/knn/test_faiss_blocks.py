"""Faiss' blocks."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from memorizing.errors import StateError
from memorizing.index_settings import parse_index
from memorizing.knn import StoredKeys, make_index
from tests.knn.ring import Ring, draw_keys
from tests.knn.test_sealed import (
    BLOCK,
    DIM,
    HEADS,
    ROWS,
    SAVED,
    K,
    draw_queries,
    make_ring,
)


def test_large_keys_do_not_overflow_in_fp16():
    ring = make_ring("faiss_hnsw:block_len=53", 1)
    ring.append(1e6 * draw_keys(ROWS, HEADS, 2 * BLOCK, DIM))
    ring.search(draw_queries(), K)


def test_lists_that_learned_from_queries_find_more_for_queries_unlike_the_keys():
    pytest.importorskip("faiss")
    shift = draw_keys(1, 1, 1, DIM, seed=5)

    def ask(num_queries: int, seed: int) -> torch.Tensor:
        queries = draw_keys(1, 1, num_queries, DIM, seed=seed, clusters=31) + shift
        return torch.nn.functional.normalize(queries, dim=-1)

    recalls = []
    for learns in ("false", "true"):
        options = f"block_len=1009,num_lists=23,num_probes=2,train_on_queries={learns}"
        ring = Ring(f"faiss_ivf:{options}", (1, 1, 1009, DIM))
        if learns == "true":
            ring.index.observe_queries(ask(1009, seed=7))
        ring.append(draw_keys(1, 1, 1009, DIM, clusters=31))
        recalls.append(ring.measure_recall(ask(211, seed=8), K))
    assert recalls[1] > recalls[0] + 0.05


def test_until_queries_were_seen_lists_are_chosen_by_the_keys():
    ring = make_ring("faiss_ivf:block_len=53,train_on_queries=true", 2 * BLOCK)
    plain = make_ring("faiss_ivf:block_len=53", 2 * BLOCK)
    mine, other = (which.search(draw_queries(), K) for which in (ring, plain))
    assert torch.equal(mine.slots, other.slots)


def test_queries_of_another_model_are_refused():
    ring = make_ring("faiss_ivf:train_on_queries=true", 1)
    ring.index.observe_queries(draw_queries())
    with pytest.raises(StateError, match="heads"):
        ring.index.observe_queries(draw_queries()[:, 1:])
    with pytest.raises(StateError, match="NaN"):
        ring.index.observe_queries(draw_queries() / 0)


@pytest.mark.parametrize("index", SAVED)
def test_several_threads_build_what_one_builds(index: str):
    settings = parse_index(index.replace("53", "2003"))
    pytest.importorskip("faiss")
    keys = draw_keys(1, HEADS, 2003, DIM)
    stored = StoredKeys(keys, (2003,))
    found = []
    before = torch.get_num_threads()
    for num_threads in (1, 3):
        torch.set_num_threads(num_threads)
        made = make_index(settings)
        made.append(stored)
        torch.set_num_threads(before)
        found.append(made.search(draw_keys(1, HEADS, 61, DIM, seed=1), stored, 2 * K))
    assert torch.equal(found[0].slots, found[1].slots)


@pytest.mark.parametrize("index", ["faiss_hnsw:block_len=1021", "faiss_ivf:block_len=1021"])
def test_keys_that_share_large_offsets_are_found(index: str):
    pytest.importorskip("faiss")
    keys, queries = draw_keys(1, 2, 1021, 29, clusters=11), draw_keys(1, 2, 31, 29, clusters=11)
    keys[..., 3] += 9
    keys[..., 5] -= 5
    keys[:, :, ::211] *= 2
    ring = Ring(index, (1, 2, 1021, 29))
    ring.append(keys)
    assert ring.measure_recall(queries + 0.2, 13) > 0.97


def test_files_of_an_older_release_are_not_read(tmp_path: Path):
    ring = make_ring("faiss_hnsw:block_len=53", BLOCK)
    (tmp_path / "manifest.json").write_text(json.dumps({"format": 1, "blocks": []}))
    (tmp_path / "0-0-0-0123456789abcdef-index.faiss").write_bytes(b"IHMp" + b"\xff" * 99)
    with pytest.raises(StateError, match="of an older release, in files that may run code"):
        ring.index.load(tmp_path, ring.stored)
    ring.index.save(tmp_path, ring.stored)
    assert {path.name for path in tmp_path.iterdir()} == {
        "manifest.json",
        "index.json",
        "0-0.safetensors",
        "1-0.safetensors",
    }
