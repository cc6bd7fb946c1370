"""Sealed blocks: which entries are in them, what is saved, and what the libraries do."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from memorizing.errors import IndexUnavailableError, StateError
from memorizing.index_settings import FaissFlatSettings, parse_index
from memorizing.knn import SealedIndex, StoredKeys, make_index
from memorizing.knn.blocks import BlockLibrary, KeyBlock
from memorizing.knn.sealed_plan import list_stretches, plan_blocks
from tests.knn.ring import Ring, draw_keys

ROWS, HEADS, CAPACITY, DIM, BLOCK, K = 2, 3, 211, 17, 53, 7
SHAPE = (ROWS, HEADS, CAPACITY, DIM)
SAVED = ["faiss_ivf:block_len=53", "faiss_hnsw:block_len=53", "scann:block_len=53"]
SCANN_TREE = "scann:block_len=103,num_leaves=2,leaves_to_search=2"


class ArrayBlock(KeyBlock):
    """Keys in an array."""

    def __init__(self, keys: np.ndarray) -> None:
        self.keys = keys.copy()

    def search(self, queries: np.ndarray, num_candidates: int) -> tuple[np.ndarray, np.ndarray]:
        scores = queries @ self.keys.T
        found = np.argsort(-scores, axis=1, kind="stable")[:, :num_candidates]
        return found, np.take_along_axis(scores, found, axis=1)

    def dump(self) -> dict[str, bytes]:
        return {"keys": self.keys.tobytes()}


class ArrayLibrary(BlockLibrary):
    """A library in a few lines, which counts what it builds and reads."""

    is_saved = True

    def __init__(self) -> None:
        self.built: list[int] = []
        self.num_read = 0

    def build(self, keys: np.ndarray, queries: np.ndarray | None) -> KeyBlock:
        self.built.append(len(keys))
        return ArrayBlock(keys)

    def restore(self, files: Mapping[str, bytes], num_keys: int, dim: int) -> KeyBlock:
        self.num_read += 1
        return ArrayBlock(np.frombuffer(files["keys"], np.float32).reshape(num_keys, dim))


@pytest.fixture
def library() -> ArrayLibrary:
    return ArrayLibrary()


@pytest.fixture
def ring(library: ArrayLibrary) -> Ring:
    ring = Ring("exact", SHAPE)
    ring.index = SealedIndex(FaissFlatSettings(block_len=BLOCK), library)
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
        # What is left of an ordinary block is too little for one.
        (range(10, 110), [range(53, 106)], 106, []),
        # A long block was dropped: the newest part of what it held is due, then the one before.
        (range(10, 211), [], 200, [range(147, 200)]),
        (range(20, 221), [range(147, 200)], 200, [range(94, 147)]),
        # Entries were overwritten before they were ever sealed.
        (range(500, 580), [], 106, [range(500, 553)]),
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
    ring.index = SealedIndex(FaissFlatSettings(block_len=CAPACITY + 1), library)
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
    # Two blocks of what came since; the one of all is there still.
    assert library.built == [BLOCK] * (half // BLOCK) * ROWS * HEADS
    for num_calls in range(4):
        library.built.clear()
        ring.append(draw_keys(1, HEADS, 1, DIM, seed=num_calls).expand(ROWS, -1, -1, -1))
        # A block of what came since, and the newest whole block of what was in the long one.
        assert len(library.built) == (2 * ROWS * HEADS if num_calls == 0 else 0)
        assert ring.measure_recall(draw_queries(), K) == 1.0


def test_a_block_that_is_overwritten_in_part_is_not_saved(ring: Ring, library, tmp_path: Path):
    ring.append(draw_keys(ROWS, HEADS, CAPACITY, DIM))
    ring.index.seal(ring.stored)
    ring.append(draw_keys(ROWS, HEADS, 1, DIM, seed=1))
    ring.index.save(tmp_path)
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
    ring.index.save(tmp_path)
    ring.index = SealedIndex(FaissFlatSettings(block_len=BLOCK), library)
    ring.index.load(tmp_path, ring.stored)
    assert torch.equal(ring.search(draw_queries(), K).slots, before.slots)
    assert len(library.built) == num_built
    assert library.num_read == 3 * ROWS * HEADS


def test_saving_again_leaves_only_what_is_named(ring: Ring, tmp_path: Path):
    ring.append(draw_keys(ROWS, HEADS, CAPACITY, DIM))
    (tmp_path / "notes.txt").write_text("mine")
    ring.index.save(tmp_path)
    first = {path.name for path in tmp_path.iterdir()}
    ring.append(draw_keys(ROWS, HEADS, CAPACITY, DIM, seed=2))
    ring.index.save(tmp_path)
    second = {path.name for path in tmp_path.iterdir()}
    assert first & second == {"notes.txt", "manifest.json"}
    manifest = json.loads((tmp_path / "manifest.json").read_text(encoding="utf-8"))
    named = {
        file["path"]
        for block in manifest["blocks"]
        for head in block["heads"]
        for file in head.values()
    }
    assert second == {"notes.txt", "manifest.json", *named}


def alter_file(folder: Path) -> None:
    path = max(folder.glob("*-*"), key=lambda file: file.stat().st_size)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def truncate_file(folder: Path) -> None:
    path = next(folder.glob("*-*"))
    path.write_bytes(path.read_bytes()[:-1])


def remove_file(folder: Path) -> None:
    next(folder.glob("*-*")).unlink()


def truncate_manifest(folder: Path) -> None:
    path = folder / "manifest.json"
    path.write_bytes(path.read_bytes()[:-9])


def change_manifest(**changes):
    def change(folder: Path) -> None:
        path = folder / "manifest.json"
        manifest = json.loads(path.read_bytes())
        target = manifest if set(changes) & set(manifest) else manifest["blocks"][0]
        target.update(changes)
        path.write_text(json.dumps(manifest), encoding="utf-8")

    return change


DAMAGES = {
    "altered": alter_file,
    "truncated": truncate_file,
    "removed": remove_file,
    "manifest truncated": truncate_manifest,
    "manifest removed": lambda folder: (folder / "manifest.json").unlink(),
    "other format": change_manifest(format=2),
    "other settings": change_manifest(index="faiss_flat"),
    "no blocks": change_manifest(blocks=7),
    "other row": change_manifest(row=ROWS),
    "twice the row": change_manifest(row=1),
    "other entries": change_manifest(entries=[1, 54]),
    "no entries": change_manifest(entries=[0, 0]),
    "entries of the future": change_manifest(entries=[0, 10**9]),
    "fewer heads": change_manifest(heads=[]),
    "outside": change_manifest(heads=[{"keys": {"path": "../keys", "sha256": ""}}] * HEADS),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
@pytest.mark.parametrize("index", SAVED)
def test_a_damaged_folder_is_refused_and_changes_nothing(index: str, damage, tmp_path: Path):
    ring = make_ring(index, 2 * BLOCK)
    before = ring.search(draw_queries(), K)
    ring.index.save(tmp_path)
    damage(tmp_path)
    with pytest.raises(StateError, match="again"):
        ring.index.load(tmp_path, ring.stored)
    after = ring.search(draw_queries(), K)
    assert torch.equal(after.slots, before.slots)
    assert torch.equal(after.scores, before.scores)


def test_other_keys_settings_or_dtypes_are_refused(tmp_path: Path):
    ring = make_ring("faiss_hnsw:block_len=53", 2 * BLOCK)
    ring.index.save(tmp_path)
    stored = ring.stored
    other = stored.keys.clone()
    other[1, 2, 3, 5] += 0.5
    refused = [
        StoredKeys(other, stored.num_appended),
        StoredKeys(stored.keys.bfloat16(), stored.num_appended),
        StoredKeys(stored.keys, (2 * BLOCK, BLOCK)),
        StoredKeys(stored.keys[:1], stored.num_appended[:1]),
        StoredKeys(stored.keys[:, :2], stored.num_appended),
        StoredKeys(stored.keys, (2 * BLOCK, 2 * BLOCK + CAPACITY)),
    ]
    for wrong in refused:
        with pytest.raises(StateError, match="memory"):
            ring.index.load(tmp_path, wrong)
    index = make_index(parse_index("faiss_hnsw:block_len=53,num_links=7"))
    with pytest.raises(StateError, match="num_links=7"):
        index.load(tmp_path, stored)


@pytest.mark.parametrize("index", SAVED[1:])
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


def test_an_index_that_would_ignore_queries_refuses_them(ring: Ring):
    with pytest.raises(StateError, match="not trained on queries"):
        ring.index.observe_queries(draw_queries())


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
