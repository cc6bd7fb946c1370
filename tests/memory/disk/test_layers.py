"""Indexes of the segments, built or saved beside them."""

from __future__ import annotations

import multiprocessing
from pathlib import Path

import pytest
import torch

from memorizing.errors import ConfigError, MemoryFolderError
from memorizing.index_settings import parse_index
from memorizing.knn.faiss_blocks import FaissLibrary
from memorizing.memory import (
    MemoryFolder,
    Retrieved,
)
from memorizing.memory.disk import state
from tests.memory.disk.examples import (
    DIM,
    HEADS,
    append,
    check_holds,
    count_entries,
    list_files,
    make_folder,
    read_entries,
)

HNSW = parse_index("faiss_hnsw:block_len=11")
QUERIES = torch.randn(2, 3 * HEADS, 5, DIM, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> MemoryFolder:
    """Of segments with more entries than a block, and less."""
    pytest.importorskip("faiss")
    monkeypatch.setattr(state, "SMALL_SEGMENT", 1)
    made = make_folder(tmp_path, ["a", "b", "c", "d"], ["bb", "e"])
    append(made, [next(name for name in "fghijklmnop" if count_entries(name) < 11)])
    assert [segment.record.num_entries > 11 for segment in made.contents.segments] == [1, 1, 0]
    return made


def check_alike(found: tuple[Retrieved, ...], expected: tuple[Retrieved, ...]) -> None:
    for mine, theirs in zip(found, expected, strict=True):
        assert torch.equal(mine.neighbors.scores, theirs.neighbors.scores)


def test_saved_indexes_are_read_and_not_built(
    folder: MemoryFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = folder.open_layer(7, index=parse_index("exact")).retrieve(QUERIES, 5)
    check_alike(folder.open_layer(7, index=HNSW).retrieve(QUERIES, 5), expected)
    folder.save_indexes(HNSW)
    folder.save_indexes(HNSW)
    assert list_files(folder.path / "index") == ["segment-000000", "segment-000001"]
    with monkeypatch.context() as patched:
        patched.setattr(FaissLibrary, "build", None)
        opened = MemoryFolder.open(folder.path)
        check_alike(opened.open_layer(7, index=HNSW).retrieve(QUERIES, 5), expected)
    # The index goes with its segment.
    folder.forget("e")
    assert list_files(folder.path / "index") == ["segment-000000"]
    folder.open_layer(7, index=HNSW).prepare()


def test_an_index_of_some_heads_is_saved_beside_that_of_all(
    folder: MemoryFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    some = [HEADS - 1]
    expected = folder.open_layer(7, heads=some).retrieve(QUERIES[:, :3], 5)
    folder.save_indexes(HNSW)
    folder.save_indexes(HNSW, {7: some})
    assert len(list((folder.path / "index" / "segment-000000").glob("7-*"))) == 2
    assert len(list((folder.path / "index" / "segment-000000").glob("3-*"))) == 1
    with pytest.raises(ConfigError, match="heads are"):
        folder.save_indexes(HNSW, {7: [HEADS]})
    monkeypatch.setattr(FaissLibrary, "build", None)
    opened = MemoryFolder.open(folder.path)
    check_alike(opened.open_layer(7, index=HNSW, heads=some).retrieve(QUERIES[:, :3], 5), expected)
    opened.open_layer(7, index=HNSW).retrieve(QUERIES, 5)


def test_indexes_that_are_made_quickly_are_not_saved(folder: MemoryFolder) -> None:
    folder.save_indexes(parse_index("int8"))
    assert not (folder.path / "index").exists()
    folder.open_layer(3, index=parse_index("int8")).retrieve(QUERIES, 5)


def test_an_index_of_int8_entries_is_saved_per_segment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("faiss")
    monkeypatch.setattr(state, "SMALL_SEGMENT", 1)
    folder = make_folder(tmp_path, ["a", "b", "c", "d"], ["bb", "e"], dtype="int8")
    folder.save_indexes(HNSW)
    found = MemoryFolder.open(tmp_path).open_layer(3, index=HNSW).retrieve(QUERIES, 5)
    assert len(found) == 2
    (expected,) = folder.open_layer(3).retrieve(QUERIES, 5)
    kept = torch.cat([part.neighbors.scores for part in found], -1).topk(5).values
    assert torch.equal(kept, expected.neighbors.scores)


def test_a_damaged_index_is_built_anew(folder: MemoryFolder, tmp_path_factory) -> None:
    folder.save_indexes(HNSW)
    expected = folder.open_layer(7).retrieve(QUERIES, 5)
    (saved,) = (folder.path / "index" / "segment-000000").glob("7-*")
    largest = max(saved.iterdir(), key=lambda path: path.stat().st_size)
    content = largest.read_bytes()
    largest.write_bytes(content[:-7])
    with pytest.warns(
        UserWarning, match=r"built anew .*truncated or altered.*; remove that folder"
    ):
        found = MemoryFolder.open(folder.path).open_layer(7, index=HNSW).retrieve(QUERIES, 5)
    check_alike(found, expected)
    outside = tmp_path_factory.mktemp("outside") / "index"
    largest.write_bytes(content)
    saved.rename(outside)
    saved.symlink_to(outside)
    with pytest.raises(MemoryFolderError, match="a link out of the memory"):
        folder.open_layer(7, index=HNSW).prepare()


def test_an_index_of_an_older_release_is_built_anew_and_replaced(folder: MemoryFolder) -> None:
    folder.save_indexes(HNSW)
    (saved,) = (folder.path / "index" / "segment-000000").glob("7-*")
    for path in saved.iterdir():
        path.unlink()
    (saved / "manifest.json").write_text('{"format": 1}')
    (saved / "0-0-0-0123456789abcdef-scann_docids.pkl").write_bytes(b"cos\nabort\n(tR.")
    expected = folder.open_layer(7).retrieve(QUERIES, 5)
    with pytest.warns(UserWarning, match="of an older release"):
        check_alike(folder.open_layer(7, index=HNSW).retrieve(QUERIES, 5), expected)
    with pytest.warns(UserWarning, match="of an older release"):
        folder.save_indexes(HNSW)
    check_alike(folder.open_layer(7, index=HNSW).retrieve(QUERIES, 5), expected)
    assert not list(saved.glob("*.pkl"))


def test_an_index_whose_files_could_hold_code_is_not_saved(folder: MemoryFolder) -> None:
    folder.save_indexes(parse_index("scann:block_len=11"))
    assert not (folder.path / "index").exists()


def test_an_index_that_was_saved_by_half_is_left_out_and_removed(folder: MemoryFolder) -> None:
    saved = folder.path / "index" / "segment-000000"
    mine = saved / ".notes.part"
    # By this release and by those before.
    names = (".memorizing-01234567-123-89abcdef.part", ".7-faiss_hnsw-0123456789ab.part")
    for name in (*names, mine.name):
        (saved / name).mkdir(parents=True)
    folder.open_layer(7, index=HNSW).prepare()
    with folder.lock():
        pass
    assert list(saved.iterdir()) == [mine]


def test_a_search_finds_what_the_folder_holds(tmp_path: Path) -> None:
    folder = make_folder(tmp_path, ["a", "b", "c"], dtype="float32")
    memory = folder.open_layer(7)
    keys, values = read_entries(folder, 7)
    keys = torch.nn.functional.normalize(keys, dim=-1)
    (found,) = memory.retrieve(keys.unsqueeze(0) * 97, 1)
    stored = read_entries(folder, 7)[0]
    expected = (keys @ stored.transpose(1, 2)).argmax(-1)
    assert torch.equal(found.neighbors.slots[0, ..., 0], expected)
    gathered = torch.stack([values[head, expected[head]] for head in range(HEADS)])
    assert torch.equal(found.fetch_values()[0, :, :, 0], gathered)


def test_a_layer_is_searched_in_one_go_where_it_is_decoded_anyway(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(state, "SMALL_SEGMENT", 1)
    names = [["a", "b", "c", "d"], ["e", "f"], ["g"]]
    coded = make_folder(tmp_path / "int8", *names, dtype="int8")
    assert len(coded.contents.segments) == 3
    (block,) = coded.open_layer(3).blocks
    assert block.load().keys.dtype == torch.bfloat16
    check_holds(coded, "abcdefg")
    mapped = make_folder(tmp_path / "bfloat16", *names).open_layer(3)
    counts = [sum(map(count_entries, group)) for group in names]
    assert mapped.first_entries == (0, counts[0], counts[0] + counts[1])


def test_a_folder_is_searched_with_scann_after_a_fork(path: Path) -> None:
    pytest.importorskip("scann")
    scann = parse_index("scann:block_len=11,oversample=13")
    memory = MemoryFolder.open(path).open_layer(7, index=scann)
    expected = memory.retrieve(QUERIES, 5)

    def search() -> None:
        # Threads of OpenMP, which are torch's and not ours, do not survive a fork.
        torch.set_num_threads(1)
        check_alike(memory.retrieve(QUERIES, 5), expected)
        check_alike(
            MemoryFolder.open(path).open_layer(7, index=scann).retrieve(QUERIES, 5), expected
        )

    process = multiprocessing.get_context("fork").Process(target=search)
    process.start()
    process.join(60)
    is_hanging = process.is_alive()
    if is_hanging:
        process.kill()
    assert not is_hanging
    assert process.exitcode == 0


@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_documents_that_are_left_out_are_as_if_they_were_not_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: str
) -> None:
    monkeypatch.setattr(state, "SMALL_SEGMENT", 1)
    names = [["a", "b", "c", "d"], ["e", "f"], ["g"], ["h"]]
    folder = make_folder(tmp_path / "all", *names, dtype=dtype)
    kept = make_folder(tmp_path / "some", ["a", "c"], ["e", "f"], ["h"], dtype=dtype)
    for layer, heads in ((3, None), (7, [1])):
        words = {"heads": heads, "forgotten": {"b", "d", "g"}}
        found = folder.open_layer(layer, **words)
        expected = kept.open_layer(layer, heads=heads)
        for part in ("keys", "values"):
            mine, theirs = (
                torch.cat([getattr(block.load(), part) for block in memory.blocks], 2)
                for memory in (found, expected)
            )
            assert torch.equal(mine, theirs)
        asked = QUERIES[:, :3] if heads else QUERIES
        best = [
            torch.cat([part.neighbors.scores for part in memory.retrieve(asked, 5)], -1).topk(5)
            for memory in (found, expected)
        ]
        assert torch.equal(best[0].values, best[1].values)
    nothing = folder.open_layer(3, forgotten=set("abcdefgh"))
    assert nothing.size == 0
    assert nothing.retrieve(QUERIES, 5) == ()
    # Segments of which nothing is left out stay mapped.
    mapped = [block.load().keys for block in folder.open_layer(3).blocks]
    again = [block.load().keys for block in folder.open_layer(3, forgotten={"b"}).blocks]
    if dtype == "float32":
        shared = [a.data_ptr() == b.data_ptr() for a, b in zip(mapped, again, strict=True)]
        assert shared == [False, True]


def test_a_saved_index_does_not_find_documents_that_are_left_out(folder: MemoryFolder) -> None:
    folder.save_indexes(HNSW)
    some = [document.name for document in folder.documents if document.name not in ("b", "bb")]
    whole = folder.open_layer(7, index=HNSW)
    found = folder.open_layer(7, index=HNSW, forgotten={"b", "bb"})
    assert found.size == sum(map(count_entries, some)) < whole.size
    exact = folder.open_layer(7, forgotten={"b", "bb"})
    check_alike(found.retrieve(QUERIES, 5), exact.retrieve(QUERIES, 5))
