"""Sealed blocks of the libraries."""

from __future__ import annotations

import json
import multiprocessing
import os
import sys
from pathlib import Path

import pytest
import torch

from memorizing.errors import IndexUnavailableError, StateError
from memorizing.index_settings import parse_index
from memorizing.knn import Neighbors, StoredKeys, make_index
from tests.knn.ring import Ring, draw_keys
from tests.knn.test_sealed import (
    BLOCK,
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


@pytest.mark.parametrize(
    "index", ["faiss_flat", "faiss_int8", "faiss_ivf", "faiss_hnsw", SCANN_TREE]
)
def test_nothing_is_printed(index: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    ring = make_ring(index, 149)
    for num_keys in (2, 47):
        ring.index.seal(ring.stored)
        ring.append(draw_keys(ROWS, HEADS, num_keys, DIM, seed=2))
    ring.index.save(tmp_path)
    ring.index.load(tmp_path, ring.stored)
    ring.search(draw_queries(), K)
    sys.stdout.flush()
    assert capfd.readouterr() == ("", "")


def test_what_others_print_during_a_build_of_scann_is_kept(capfd: pytest.CaptureFixture[str]):
    pytest.importorskip("scann")
    from memorizing.knn.scann_blocks import _hold_back_log

    with _hold_back_log():
        os.write(2, b"mine\nI0000 00:00:1.2 1 partitioner.cc:5] theirs\nW0000 00 x\nmine too\n")
    assert capfd.readouterr().err == "mine\nmine too\n"


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


@pytest.mark.parametrize(("package", "index"), [("faiss", "faiss_ivf"), ("scann", "scann")])
def test_a_missing_package_is_named_with_its_command(package: str, index: str, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(IndexUnavailableError, match=rf"pip install 'memorizing\[{package}\]'"):
        make_index(parse_index(index))


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


def test_files_of_an_older_release_are_not_read(tmp_path: Path):
    ring = make_ring("faiss_hnsw:block_len=53", BLOCK)
    (tmp_path / "manifest.json").write_text(json.dumps({"format": 1, "blocks": []}))
    (tmp_path / "0-0-0-0123456789abcdef-index.faiss").write_bytes(b"IHMp" + b"\xff" * 99)
    with pytest.raises(StateError, match="of an older release, in files that may run code"):
        ring.index.load(tmp_path, ring.stored)
    ring.index.save(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {
        "manifest.json",
        "index.json",
        "0-0.safetensors",
        "1-0.safetensors",
    }


def test_nothing_of_scann_is_written_or_read(tmp_path: Path):
    ring = make_ring("scann:block_len=53", BLOCK)
    ring.index.save(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"manifest.json", "index.json"}
    for name in ("scann_docids.pkl", "0-0-0-0123456789abcdef-scann_docids.pkl"):
        (tmp_path / name).write_bytes(b"cos\nabort\n(tR.")
    ring.index.load(tmp_path, ring.stored)
    ring.search(draw_queries(), K)
