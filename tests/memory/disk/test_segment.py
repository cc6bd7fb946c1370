"""A segment is a safetensors file of known length, and is looked at before it is used."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from memorizing.errors import MemoryFolderError
from memorizing.knn.int8 import encode_int8
from memorizing.memory import (
    FolderDescription,
    MemoryFolder,
    NewDocument,
    StoredDocument,
    hash_text,
)
from memorizing.memory.disk import segment
from memorizing.memory.disk.manifest import Manifest, SegmentRecord, format_manifest
from memorizing.memory.disk.segment import decode_int8, plan_segment
from tests.memory.disk.examples import (
    DIM,
    HEADS,
    append,
    describe,
    draw_entries,
    edit_segment,
    list_files,
    make_folder,
    write_text,
)
from tests.memory.disk.test_folder_refusals import find_segment


@pytest.mark.parametrize("num_bytes", [0, 7, 100, -1])
def test_a_segment_that_was_cut_off_is_refused_when_opened(path: Path, num_bytes: int) -> None:
    segment = find_segment(path)
    segment.write_bytes(segment.read_bytes()[:num_bytes])
    with pytest.raises(MemoryFolderError, match=r"segment-000001.safetensors has .* cut off"):
        MemoryFolder.open(path)


def test_a_segment_that_grew_is_refused_when_opened(path: Path) -> None:
    with find_segment(path).open("ab") as file:
        file.write(b"0")
    with pytest.raises(MemoryFolderError, match="cut off or altered"):
        MemoryFolder.open(path)


@pytest.mark.parametrize("place", [3, 31])
def test_another_header_is_refused_when_opened(path: Path, place: int) -> None:
    flip(find_segment(path), place)
    with pytest.raises(MemoryFolderError, match="header"):
        MemoryFolder.open(path)


def test_altered_entries_are_refused_at_the_first_touch_and_by_verify(path: Path) -> None:
    flip(find_segment(path), -11)
    folder = MemoryFolder.open(path)
    memory = folder.open_layer(3)
    for touch in (
        lambda: memory.retrieve(torch.zeros(1, HEADS, 5, DIM), 3),
        lambda: memory.prepare(),
        lambda: folder.contents.token_of(torch.tensor(0)),
        lambda: folder.verify(),
        lambda: folder.forget("a"),
        lambda: append(folder, ["d"]),
        lambda: MemoryFolder.merge([path], path.parent / "merged"),
    ):
        with pytest.raises(MemoryFolderError, match=r"segment-000001.safetensors was altered"):
            touch()
    assert list_files(path.parent) == ["memory"]
    assert [document.name for document in MemoryFolder.open(path).documents] == ["a", "b", "c"]


def test_verify_sees_what_happened_after_the_memory_was_opened(path: Path) -> None:
    folder = MemoryFolder.open(path)
    folder.verify()
    folder.open_layer(3).prepare()
    flip(find_segment(path), -11)
    with pytest.raises(MemoryFolderError, match="was altered"):
        folder.verify()


def test_a_large_file_is_checked_part_by_part_and_nothing_of_it_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(segment, "_PART_BYTES", 2**16)
    folder = MemoryFolder.create(tmp_path / "large", FolderDescription("x", (3,), 3, 1031))
    keys, values = torch.randn(2, 3, 257, 1031).bfloat16()
    folder.append([NewDocument("a", 257, 257, hash_text(""), "")], {3: (keys, values)})
    opened = MemoryFolder.open(tmp_path / "large")

    def count_mapped() -> int:
        return int(Path("/proc/self/statm").read_text().split()[2]) * os.sysconf("SC_PAGE_SIZE")

    before = count_mapped() if os.path.exists("/proc/self/statm") else None
    opened.contents.segments[0].verify()
    if before is not None:
        assert count_mapped() - before < keys.nbytes // 2
    found = opened.open_layer(3).blocks[0].load()
    assert torch.equal(found.keys[0], keys)
    assert torch.equal(found.values[0], values)
    flip(find_segment(tmp_path / "large"), -11)
    with pytest.raises(MemoryFolderError, match="was altered"):
        MemoryFolder.open(tmp_path / "large").verify()


@pytest.mark.parametrize("number", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize(
    ("dtype", "name"),
    [
        ("bfloat16", "layers.7.keys"),
        ("float32", "layers.3.values"),
        ("int8", "layers.3.key_factors"),
    ],
)
def test_entries_that_are_not_finite_are_refused_though_their_checksum_is_right(
    dtype: str, name: str, number: float, tmp_path: Path
) -> None:
    make_folder(tmp_path, ["a", "b"], dtype=dtype)
    edit_segment(tmp_path, name, lambda tensor: tensor[1, 2:3].fill_(number))
    folder = MemoryFolder.open(tmp_path)
    for touch in (folder.verify, folder.open_layer(3).prepare, folder.open_layer(7).prepare):
        with pytest.raises(MemoryFolderError, match=f"NaN or infinite in {name}; use another"):
            touch()


def test_a_text_that_is_not_in_utf8_is_refused(
    tmp_path: Path,
) -> None:
    def open_edited(name: str, edit: Callable[[torch.Tensor], object]) -> MemoryFolder:
        place = tmp_path / f"{len(list_files(tmp_path))}"
        append(MemoryFolder.create(place, describe()), ["a", "b"], keep_text=True)
        edit_segment(place, name, edit)
        return MemoryFolder.open(place)

    contents = open_edited("texts", lambda texts: texts[:1].fill_(0xFF)).contents
    with pytest.raises(MemoryFolderError, match="text of 'a' .* is not in UTF-8"):
        contents.read_text("a")
    assert contents.read_text("b") == write_text("b")


def test_a_segment_that_is_cut_off_while_it_is_open_is_an_error_and_no_crash(path: Path) -> None:
    folder = MemoryFolder.open(path)
    memory, queries = folder.open_layer(3), torch.ones(1, HEADS, 5, DIM)
    searched = folder.open_layer(7)
    searched.retrieve(queries, 3)
    os.truncate(find_segment(path), 4096)
    for touch in (
        lambda: memory.retrieve(queries, 3),
        lambda: searched.retrieve(queries, 3),
        searched.prepare,
        lambda: folder.contents.read_text("a"),
        lambda: folder.contents.token_of(torch.tensor(0)),
        lambda: append(folder, ["d"]),
        lambda: folder.forget("a"),
        folder.verify,
    ):
        with pytest.raises(MemoryFolderError, match="was cut off|did not keep the text"):
            touch()


def test_a_segment_larger_than_the_memory_of_the_machine_is_opened(tmp_path: Path) -> None:
    description = FolderDescription("of a model", (5,), 3, 1024, "float32")
    num_entries = 2**41 // description.bytes_per_entry
    layout = plan_segment(description, num_entries, 0, 0)
    file = "segment-000000.safetensors"
    MemoryFolder.create(tmp_path, description)
    # Its entries are a hole in the file, for they are not read.
    (tmp_path / file).write_bytes(layout.header)
    os.truncate(tmp_path / file, layout.num_bytes)
    counts = (num_entries, 0, 0, layout.num_bytes)
    manifest = Manifest(
        description,
        (SegmentRecord(file, *counts, "0" * 64),),
        (StoredDocument("a", num_entries, num_entries, "0" * 64, file, 0),),
        1,
    )
    (tmp_path / "manifest.json").write_bytes(format_manifest(manifest))
    assert MemoryFolder.open(tmp_path).open_layer(5).size == num_entries


def flip(path: Path, place: int) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


def test_a_segment_is_a_safetensors_file(tmp_path: Path) -> None:
    folder = make_folder(tmp_path, ["a"], dtype="int8")
    with safe_open(folder.contents.segments[0].path, "pt") as file:
        codes = file.get_tensor("layers.7.values")
        factors = file.get_tensor("layers.7.value_factors")
    expected = encode_int8(draw_entries("a")[7][1])
    assert torch.equal(codes, expected[0])
    assert torch.equal(factors, expected[1].squeeze(-1))


@pytest.mark.parametrize("scale", [0.0, 1e-30, 1.0, 1e30])
def test_int8_is_off_by_at_most_half_a_step_of_its_vector(scale: float) -> None:
    torch.manual_seed(0)
    vectors = torch.randn(HEADS, 31, DIM) * scale
    vectors[0, 5] = 0
    codes, factors = encode_int8(vectors)
    decoded = decode_int8(codes, factors.squeeze(-1), torch.float32)
    most = vectors.abs().amax(-1, keepdim=True) / 254
    assert bool(((decoded - vectors).abs() <= most * 1.001).all())
    assert not decoded[0, 5].any()


def test_int8_takes_half_of_the_bytes(tmp_path: Path) -> None:
    # With many entries of a usual length, so that headers do not count.
    sizes = {}
    torch.manual_seed(0)
    entries = {0: (torch.randn(3, 997, 64), torch.randn(3, 997, 64))}
    for dtype in ("bfloat16", "int8"):
        description = FolderDescription("of a model", (0,), 3, 64, dtype)
        folder = MemoryFolder.create(tmp_path / dtype, description)
        folder.append([NewDocument("a", 997, 997, hash_text("a"))], entries)
        sizes[dtype] = folder.contents.segments[0].path.stat().st_size
        assert abs(sizes[dtype] - 997 * (description.bytes_per_entry + 4)) < 1024
    assert sizes["int8"] < 0.54 * sizes["bfloat16"]


@pytest.mark.skipif(not Path("/proc/self/smaps").is_file(), reason="only Linux tells it")
def test_of_a_large_file_what_was_searched_does_not_stay_resident(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    num_entries, dim = 5003, 37
    folder = MemoryFolder.create(tmp_path / "m", FolderDescription("x", (0,), 1, dim))
    keys = torch.randn(1, num_entries, dim).bfloat16()
    document = NewDocument("a", num_entries, num_entries, hash_text(""), None)
    folder.append([document], {0: (keys, keys)})
    (file,) = folder.contents.segments
    stored = file.get_tensor("layers.0.keys")
    for limit, is_kept in ((2**26, True), (2**10, False)):
        monkeypatch.setattr(segment, "_PART_BYTES", limit)
        sizes = []
        for _ in range(2 * segment._LET_GO_EVERY):
            file.begin_search()
            sizes.append(measure_resident(file.path))
            # What is let go of is there again.
            assert torch.equal(stored, keys)
        assert [size > 0 for size in sizes].count(False) == (0 if is_kept else 2)
        assert max(sizes) * 1024 > stored.numel() * 2


def measure_resident(path: Path) -> int:
    """KiB of a mapped file that are resident in this process."""
    lines = Path("/proc/self/smaps").read_text().splitlines()
    (start,) = (number for number, line in enumerate(lines) if line.endswith(str(path)))
    return next(int(line.split()[1]) for line in lines[start:] if line.startswith("Rss:"))
