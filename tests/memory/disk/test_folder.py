"""What is put into a folder comes back from it."""

from __future__ import annotations

import os
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from memorizing.errors import MemoryFolderError
from memorizing.memory import (
    FolderDescription,
    MemoryFolder,
    NewDocument,
    StoredDocument,
    hash_text,
)
from memorizing.memory.disk import state
from memorizing.memory.disk.manifest import Manifest, SegmentRecord, format_manifest
from memorizing.memory.disk.segment import plan_segment
from tests.memory.disk.examples import (
    DIM,
    HEADS,
    LAYERS,
    append,
    check_holds,
    describe,
    draw_entries,
    list_files,
    make_folder,
    write_text,
)

DTYPES = ["bfloat16", "float16", "float32", "int8"]


@pytest.mark.parametrize("dtype", DTYPES)
def test_entries_come_back_as_they_were_rounded_once(dtype: str, tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "deep" / "a.memory", ["a", "b"], ["c"], dtype=dtype)
    check_holds(folder, ["a", "b", "c"])
    opened = MemoryFolder.open(folder.path, fingerprint="of a model")
    assert opened.description == describe(dtype)
    check_holds(opened, ["a", "b", "c"])
    assert opened.verify() == ("manifest.json", opened.contents.segments[0].path.name)


def test_small_additions_are_joined_and_int8_is_not_rounded_again(tmp_path: Path) -> None:
    folder = make_folder(tmp_path, dtype="int8")
    names = [f"document {number}" for number in range(17)]
    for name in names:
        append(folder, [name])
    check_holds(folder, names)
    assert len(folder.contents.segments) == 1
    assert list_files(tmp_path) == ["lock", "manifest.json", "segment-000016.safetensors"]


def test_many_additions_make_few_segments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(state, "SMALL_SEGMENT", 29)
    monkeypatch.setattr(state, "LARGEST_JOINED", 211)
    folder = make_folder(tmp_path)
    names = [f"document {number}" for number in range(37)]
    for name in names:
        append(folder, [name])
        sizes = [segment.record.num_entries for segment in folder.contents.segments]
        assert len(sizes) <= 2 + 3 + folder.num_entries // 100
        assert max(sizes) <= 211
    check_holds(folder, names)


def test_a_forgotten_document_is_gone_from_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(state, "SMALL_SEGMENT", 1)
    folder = MemoryFolder.create(tmp_path, describe("float32"))
    for names in (["a", "b", "c", "d", "e"], ["secret", "f"], ["g"]):
        append(folder, names, keep_text=True)
    untouched = {folder.contents.segments[place].path for place in (0, 2)}
    folder.forget("secret")
    check_holds(folder, ["a", "b", "c", "d", "e", "f", "g"])
    assert untouched < {segment.path for segment in folder.contents.segments}
    check_holds(MemoryFolder.open(tmp_path), ["a", "b", "c", "d", "e", "f", "g"])
    content = b"".join(path.read_bytes() for path in tmp_path.iterdir())
    assert write_text("f").encode() in content
    assert write_text("secret").encode() not in content
    assert b"secret" not in content
    assert draw_entries("secret")[3][0][0, 0].numpy().tobytes() not in content
    assert draw_entries("f")[3][0][0, 0].numpy().tobytes() in content
    with pytest.raises(MemoryFolderError, match="no document 'secret'"):
        folder.forget("secret")
    for name in ("g", "a", "f", "b", "c", "d", "e"):
        folder.forget(name)
    assert list_files(tmp_path) == ["lock", "manifest.json"]
    append(folder, ["secret"])
    check_holds(MemoryFolder.open(tmp_path), ["secret"])


def test_documents_are_replaced_in_one_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(state, "SMALL_SEGMENT", 1)
    folder = make_folder(tmp_path, ["a", "b", "c", "d"], ["e", "f"], ["g"])
    states = []
    real = state.write_bytes

    def follow(path: Path, content: bytes) -> str:
        found = real(path, content)
        states.append([document.name for document in MemoryFolder.open(tmp_path).documents])
        return found

    monkeypatch.setattr(state, "write_bytes", follow)
    append(folder, ["new", "e", "b"], replaced=["b", "e", "not there"])
    assert states == [["a", "c", "d", "f", "g", "new", "e", "b"]]
    check_holds(MemoryFolder.open(tmp_path), states[0])
    entry = torch.ones(HEADS, 1, DIM)
    other = NewDocument("a", 1, 1, hash_text("other"))
    folder.append([other], dict.fromkeys(LAYERS, (entry, entry)), replaced=["a"])
    assert [document.name for document in folder.documents] == [*states[0][1:], "a"]
    assert folder.documents[-1].sha256 == other.sha256


@pytest.mark.parametrize("num_forgotten", [1, 3, 5])
def test_several_documents_are_forgotten_with_every_segment_written_once(
    num_forgotten: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(state, "SMALL_SEGMENT", 1)
    folder = make_folder(tmp_path, ["a", "b", "c", "d", "e", "f"], ["h", "i"], ["g"])
    before = folder.contents.manifest.next_segment
    names = ["a", "h", "c", "f", "b"][:num_forgotten]
    with pytest.raises(MemoryFolderError, match="no document 'z'"):
        folder.forget(*names, "z")
    assert len(folder.documents) == 9
    folder.forget(*names)
    assert folder.contents.manifest.next_segment - before == min(2, num_forgotten)
    check_holds(MemoryFolder.open(tmp_path), [name for name in "abcdefhig" if name not in names])


def test_a_folder_where_a_memory_may_be_made_holds_none(tmp_path: Path) -> None:
    assert MemoryFolder.find(tmp_path / "new") is None
    for name in ("lock", ".manifest.json.part", ".memorizing-01234567-1-89abcdef.part"):
        (tmp_path / name).touch()
        assert MemoryFolder.find(tmp_path) is None
    made = make_folder(tmp_path, ["a"])
    found = MemoryFolder.find(tmp_path)
    assert found is not None
    assert found.documents == made.documents
    with pytest.raises(MemoryFolderError, match="is a file"):
        MemoryFolder.find(tmp_path / "lock")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").touch()
    with pytest.raises(MemoryFolderError, match="holds no memory"):
        MemoryFolder.find(tmp_path / "mine")


def test_a_memory_without_documents_can_be_opened_and_searched(tmp_path: Path) -> None:
    make_folder(tmp_path)
    folder = MemoryFolder.open(tmp_path)
    nothing = torch.empty(HEADS, 0, DIM)
    folder.append([], dict.fromkeys(LAYERS, (nothing, nothing)))
    assert folder.open_layer(3).retrieve(torch.zeros(1, HEADS, 5, DIM), 3) == ()
    assert folder.verify() == ("manifest.json",)


def test_a_memory_of_a_gibibyte_is_opened_in_less_than_a_fifth_of_a_second(tmp_path: Path) -> None:
    description = FolderDescription("of a model", (12,), 3, 64)
    num_entries = 2**30 // description.bytes_per_entry + 1
    layout = plan_segment(description, num_entries, 0, 0)
    file = "segment-000000.safetensors"
    # Its entries are a hole in the file, for they are not read.
    MemoryFolder.create(tmp_path, description)
    (tmp_path / file).write_bytes(layout.header)
    os.truncate(tmp_path / file, layout.num_bytes)
    record = SegmentRecord(file, num_entries, 0, 0, layout.num_bytes, "0" * 64)
    each = num_entries // 1009
    documents = [
        StoredDocument(f"document {number}", each, each, "0" * 64, file, number * each)
        for number in range(1009)
    ]
    documents[-1] = replace(
        documents[-1], num_entries=num_entries - 1008 * each, num_tokens=num_entries
    )
    manifest = Manifest(description, (record,), tuple(documents), 1)
    (tmp_path / "manifest.json").write_bytes(format_manifest(manifest))
    times = []
    for _ in range(5):
        start = time.perf_counter()
        folder = MemoryFolder.open(tmp_path, fingerprint="of a model")
        assert folder.open_layer(12).size == num_entries
        times.append(time.perf_counter() - start)
    assert min(times) < 0.2, times
