"""Sealed blocks: which entries are in them, what is saved, and what the libraries do."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import sys
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from memorizing.errors import IndexUnavailableError, StateError
from memorizing.index_settings import FaissIvfSettings, parse_index
from memorizing.knn import Neighbors, SealedIndex, StoredKeys, make_index
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
    ring.index = SealedIndex(FaissIvfSettings(block_len=BLOCK), library)
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
    assert first & second == {"notes.txt", "manifest.json", "index.json"}
    blocks = json.loads((tmp_path / "index.json").read_text(encoding="utf-8"))["blocks"]
    named = {f"{block['row']}-{block['entries'][0]}.safetensors" for block in blocks}
    assert second == {"notes.txt", "manifest.json", "index.json", *named}


def alter_file(folder: Path) -> None:
    path = max(folder.glob("*.safetensors"), key=lambda file: file.stat().st_size)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def truncate_file(folder: Path) -> None:
    path = next(folder.glob("*.safetensors"))
    path.write_bytes(path.read_bytes()[:-1])


def remove_file(folder: Path) -> None:
    next(folder.glob("*.safetensors")).unlink()


def truncate_manifest(folder: Path) -> None:
    path = folder / "manifest.json"
    path.write_bytes(path.read_bytes()[:-9])


def stamp(folder: Path) -> None:
    """Write the manifest anew, as somebody would who wants the folder to be read."""
    path = folder / "manifest.json"
    manifest = json.loads(path.read_bytes())
    for name, described in manifest["files"].items():
        content = (folder / name).read_bytes()
        described.update(bytes=len(content), sha256=hashlib.sha256(content).hexdigest())
    path.write_text(json.dumps(manifest), encoding="utf-8")


def change_description(**changes):
    def change(folder: Path) -> None:
        path = folder / "index.json"
        values = json.loads(path.read_bytes())
        target = values if set(changes) & set(values) else values["blocks"][0]
        target.update(changes)
        path.write_text(json.dumps(values), encoding="utf-8")
        stamp(folder)

    return change


def change_arrays(change_one):
    def change(folder: Path) -> None:
        path = folder / "0-0.safetensors"
        arrays = load_file(path)
        for name in list(arrays):
            arrays[name] = change_one(arrays[name])
        save_file(arrays, path)
        stamp(folder)

    return change


def rename_arrays(folder: Path) -> None:
    path = folder / "0-0.safetensors"
    save_file({f"9{name}": array for name, array in load_file(path).items()}, path)
    stamp(folder)


DAMAGES = {
    "altered": alter_file,
    "truncated": truncate_file,
    "removed": remove_file,
    "manifest truncated": truncate_manifest,
    "manifest removed": lambda folder: (folder / "manifest.json").unlink(),
    "description removed": lambda folder: (folder / "index.json").unlink(),
    "other format": change_description(format=1),
    "other settings": change_description(index="faiss_flat"),
    "no blocks": change_description(blocks=7),
    "other row": change_description(row=ROWS),
    "twice the row": change_description(row=1),
    "other entries": change_description(entries=[1, 54]),
    "no entries": change_description(entries=[0, 0]),
    "one end": change_description(entries=[53]),
    "entries of the future": change_description(entries=[0, 10**9]),
    "entries without bound": change_description(entries=[0, 1e400]),
    "arrays of other heads": rename_arrays,
    "arrays of fewer keys": change_arrays(lambda array: array[:-1].clone()),
    "arrays of no keys": change_arrays(lambda array: array[:0].clone()),
    "arrays of larger numbers": change_arrays(lambda array: array + 1000),
    "arrays of lower numbers": change_arrays(lambda array: array - 1000),
    "arrays of ones": change_arrays(torch.ones_like),
    "arrays of zeros": change_arrays(torch.zeros_like),
    "arrays turned": change_arrays(lambda array: array.flip(0)),
    "arrays of another dtype": change_arrays(lambda array: array.double()),
    "arrays of another shape": change_arrays(lambda array: array[None]),
}
HARMLESS = {
    # Every key in the first list, or lists in another order: slow or bad, but a valid index.
    ("faiss_ivf", "arrays of zeros"),
    ("faiss_ivf", "arrays turned"),
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("index", SAVED)
def test_a_damaged_folder_is_refused_and_changes_nothing(index: str, damage: str, tmp_path: Path):
    ring = make_ring(index, 2 * BLOCK)
    before = ring.search(draw_queries(), K)
    ring.index.save(tmp_path)
    DAMAGES[damage](tmp_path)
    if (index.partition(":")[0], damage) in HARMLESS:
        ring.index.load(tmp_path, ring.stored)
        ring.search(draw_queries(), K)
        return
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
