"""What cannot be right is refused before it is used: what was seen, and what to do."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

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
from memorizing.memory.disk.manifest import Manifest, SegmentRecord, format_manifest
from memorizing.memory.disk.segment import plan_segment
from tests.memory.disk.examples import (
    DIM,
    HEADS,
    LAYERS,
    append,
    check_holds,
    count_entries,
    describe,
    draw_entries,
    edit_manifest,
    edit_segment,
    list_files,
    make_document,
    make_folder,
    write_text,
)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Of a memory with three documents."""
    make_folder(tmp_path / "memory", ["a", "b"], ["c"])
    return tmp_path / "memory"


def find_segment(path: Path) -> Path:
    return next(path.glob("segment-*.safetensors"))


def test_a_memory_of_another_model_is_refused(path: Path) -> None:
    with pytest.raises(MemoryFolderError, match="'of a model' read, and this one has 'of another'"):
        MemoryFolder.open(path, fingerprint="of another")


def test_what_is_no_memory_is_refused(path: Path, tmp_path: Path) -> None:
    for place in (tmp_path, tmp_path / "nothing"):
        with pytest.raises(MemoryFolderError, match="holds no memory"):
            MemoryFolder.open(place)
    with pytest.raises(MemoryFolderError, match="cannot be read"):
        MemoryFolder.open(path / "manifest.json")


def test_a_memory_is_not_created_over_another_or_among_other_files(
    path: Path, tmp_path: Path
) -> None:
    with pytest.raises(MemoryFolderError, match="holds a memory already"):
        MemoryFolder.create(path, describe())
    (tmp_path / "thesis.tex").write_text("")
    with pytest.raises(MemoryFolderError, match="other files"):
        MemoryFolder.create(tmp_path, describe())
    assert list_files(tmp_path) == ["memory", "thesis.tex"]
    # Of a lost manifest, the entries are not removed.
    (path / "manifest.json").unlink()
    with pytest.raises(MemoryFolderError, match="other files"):
        MemoryFolder.create(path, describe())
    assert find_segment(path).exists()


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


def test_a_text_that_is_not_in_utf8_and_tokens_that_are_not_of_it_are_refused(
    tmp_path: Path,
) -> None:
    def open_edited(name: str, edit: Callable[[torch.Tensor], object]) -> MemoryFolder:
        place = tmp_path / f"{len(list_files(tmp_path))}"
        append(MemoryFolder.create(place, describe()), ["a", "b"], keep_text=True)
        edit_segment(place, name, edit)
        return MemoryFolder.open(place)

    contents = open_edited("texts", lambda texts: texts[:1].fill_(0xFF)).contents
    for read in (lambda: contents.read_text("a"), lambda: contents.read_around(0, 5)):
        with pytest.raises(MemoryFolderError, match="text of 'a' .* is not in UTF-8"):
            read()
    assert contents.read_text("b") == write_text("b")
    for token in (-1, count_entries("a"), 2**31 - 1):
        contents = open_edited(
            "tokens", lambda tokens, token=token: tokens[:1].fill_(token)
        ).contents
        with pytest.raises(MemoryFolderError, match=f"an entry of token {token} of 'a', which has"):
            contents.read_around(0, 5)
    for span in (-5, 2**31 - 1):
        contents = open_edited(
            "token_spans", lambda spans, span=span: spans[:1].fill_(span)
        ).contents
        assert contents.read_around(0, 5).token == ""


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


@pytest.mark.parametrize(
    "settings",
    ['{"a": ' * 900 + "1" + "}" * 900, "[" * 5000 + "]" * 5000, '"' + "x" * 10**6, "1" * 5000],
    ids=["nested", "nested too deeply", "cut", "a number too long"],
)
def test_settings_that_are_nested_or_damaged_end_in_an_error_of_ours(
    settings: str, path: Path
) -> None:
    content = (path / "manifest.json").read_text()
    (path / "manifest.json").write_text(content.replace('{"top": 3}', settings))
    with pytest.raises(MemoryFolderError, match=r"manifest\.json is refused") as caught:
        MemoryFolder.open(path)
    assert len(str(caught.value)) < 1000


def test_a_missing_segment_is_refused(path: Path) -> None:
    find_segment(path).unlink()
    with pytest.raises(MemoryFolderError, match=r"segment-000001.safetensors is missing"):
        MemoryFolder.open(path)


def test_links_and_pipes_are_not_followed(path: Path, tmp_path: Path) -> None:
    for name in ("manifest.json", find_segment(path).name):
        outside = tmp_path / "outside"
        (path / name).replace(outside)
        (path / name).symlink_to(outside)
        with pytest.raises(MemoryFolderError, match="no links"):
            MemoryFolder.open(path)
        (path / name).unlink()
        os.mkfifo(path / name)
        with pytest.raises(MemoryFolderError, match="is no file"):
            MemoryFolder.open(path)
        (path / name).unlink()
        (path / name).mkdir()
        with pytest.raises(MemoryFolderError, match=r"no file|cannot be read"):
            MemoryFolder.open(path)
        (path / name).rmdir()
        outside.replace(path / name)
    check_holds(MemoryFolder.open(path), "abc")


def test_every_altered_byte_of_a_manifest_is_seen(path: Path) -> None:
    content = (path / "manifest.json").read_bytes()
    assert content.count(b"\n") > 10
    for place in range(0, len(content), 7):
        altered = bytearray(content)
        altered[place] ^= 1
        (path / "manifest.json").write_bytes(altered)
        with pytest.raises(MemoryFolderError, match=r"manifest.json is refused"):
            MemoryFolder.open(path)
    for num_bytes in (0, 1, len(content) // 2, len(content) - 3):
        (path / "manifest.json").write_bytes(content[:num_bytes])
        with pytest.raises(MemoryFolderError, match=r"manifest.json is refused"):
            MemoryFolder.open(path)


@pytest.mark.parametrize("content", ["[]", "null", "{}", '{"format": "other"}', "[" * 100_000])
def test_another_file_is_no_manifest(path: Path, content: str) -> None:
    (path / "manifest.json").write_text(content)
    with pytest.raises(MemoryFolderError, match=r"manifest.json is refused"):
        MemoryFolder.open(path)


def test_another_format_version_is_refused_with_what_to_do(path: Path) -> None:
    edit_manifest(path, lambda values: values.update(version=2))
    with pytest.raises(MemoryFolderError, match=r"version 2, .* reads 1; use the version that"):
        MemoryFolder.open(path)


def set_in(part: str, number: int, **values: Any) -> Callable[[dict[str, Any]], object]:
    return lambda manifest: manifest[part][number].update(values)


def move_file(name: str) -> Callable[[dict[str, Any]], object]:
    """Name the segment otherwise, everywhere."""

    def edit(manifest: dict[str, Any]) -> None:
        manifest["segments"][0]["file"] = name
        for document in manifest["documents"]:
            document["segment"] = name

    return edit


NONSENSE = {
    "no layers": lambda manifest: manifest.update(layers=[]),
    "layers that are no list": lambda manifest: manifest.update(layers=7),
    "layers twice": lambda manifest: manifest.update(layers=[3, 3]),
    "a layer that is no number": lambda manifest: manifest.update(layers=[3, "7"]),
    "no heads": lambda manifest: manifest.update(num_heads=0),
    "heads that are true": lambda manifest: manifest.update(num_heads=True),
    "other heads": lambda manifest: manifest.update(num_heads=HEADS + 1),
    "half a dimension": lambda manifest: manifest.update(head_dim=0.5),
    "another dtype": lambda manifest: manifest.update(dtype="float32"),
    "an unknown dtype": lambda manifest: manifest.update(dtype="float8"),
    "a dtype that is a list": lambda manifest: manifest.update(dtype=["int8"]),
    "no fingerprint": lambda manifest: manifest.update(fingerprint=""),
    "settings that are no dict": lambda manifest: manifest.update(settings=[]),
    "a key too many": lambda manifest: manifest.update(more=1),
    "a key too few": lambda manifest: manifest.pop("settings"),
    "segments that are no list": lambda manifest: manifest.update(segments={}),
    "segments that are texts": lambda manifest: manifest.update(segments=["a"]),
    "a negative number of segments": lambda manifest: manifest.update(next_segment=-1),
    "a name that was given": lambda manifest: manifest.update(next_segment=1),
    "a path upwards": move_file("../segment-000001.safetensors"),
    "an absolute path": move_file("/tmp/segment-000001.safetensors"),
    "a path downwards": move_file("index/segment-000001.safetensors"),
    "a line break": move_file("segment-000001.safetensors\n"),
    "another file": move_file("manifest.json"),
    "no path": move_file(""),
    "a file twice": lambda manifest: manifest.update(segments=manifest["segments"] * 2),
    "a segment of another size": set_in("segments", 0, num_bytes=10**6),
    "too many entries": set_in("segments", 0, num_entries=10**12),
    "more than numbers can be": set_in("segments", 0, num_entries=10**30),
    "a negative size": set_in("segments", 0, num_entries=-5),
    "a size that is no number": set_in("segments", 0, num_entries="5"),
    "a checksum that is none": set_in("segments", 0, sha256="0" * 63),
    "a document twice": lambda manifest: manifest["documents"].append(manifest["documents"][0]),
    "a document less": lambda manifest: manifest["documents"].pop(),
    "documents in another order": lambda manifest: manifest["documents"].reverse(),
    "a document elsewhere": set_in("documents", 1, segment="segment-000000.safetensors"),
    "a document before all": set_in("documents", 0, first_entry=-1),
    "documents over another": set_in("documents", 1, first_entry=0),
    "a text that is not there": set_in("documents", 1, text=[0, 5]),
    "a text that ends before it begins": set_in("documents", 1, text=[5, 0]),
    "a text that is a number": set_in("documents", 1, text=5),
    "spans without text": set_in("documents", 1, spans=[0, 0]),
    "a document without name": lambda manifest: manifest["documents"][0].pop("name"),
    "a name that is a number": set_in("documents", 0, name=5),
    "more entries than tokens": set_in("documents", 0, num_tokens=0),
}


@pytest.mark.parametrize("nonsense", NONSENSE)
def test_nonsense_in_a_manifest_is_refused(path: Path, nonsense: str) -> None:
    edit_manifest(path, NONSENSE[nonsense])
    with pytest.raises(MemoryFolderError, match=r"manifest.json is refused"):
        MemoryFolder.open(path)


def test_a_manifest_that_was_edited_by_hand_is_refused(path: Path) -> None:
    values = json.loads((path / "manifest.json").read_text())
    values["documents"][0]["name"] = "another"
    (path / "manifest.json").write_text(json.dumps(values))
    with pytest.raises(MemoryFolderError, match="it was altered"):
        MemoryFolder.open(path)


def test_a_document_is_read_once(path: Path) -> None:
    folder = MemoryFolder.open(path)
    with pytest.raises(MemoryFolderError, match=r"'a' already, with the same text; leave it out"):
        append(folder, ["d", "a"])
    other = NewDocument("a", 1, 1, hash_text("other"))
    entry = torch.zeros(HEADS, 1, DIM)
    with pytest.raises(MemoryFolderError, match=r"another text; forget it first"):
        folder.append([other], dict.fromkeys(LAYERS, (entry, entry)))
    with pytest.raises(MemoryFolderError, match="two of the documents"):
        append(folder, ["d", "d"])
    check_holds(folder, "abc")


def test_entries_that_do_not_fit_are_refused(path: Path) -> None:
    folder = MemoryFolder.open(path)
    entries = draw_entries("d")
    keys, values = entries[3]
    for wrong in (
        {3: entries[3]},
        entries | {5: entries[3]},
        entries | {3: (keys[:, 1:], values[:, 1:])},
        entries | {3: (keys, values[:1])},
        entries | {3: (keys.unsqueeze(0), values.unsqueeze(0))},
        entries | {3: (keys[..., 1:], values[..., 1:])},
    ):
        with pytest.raises(MemoryFolderError, match=r"this memory has|both must be"):
            folder.append([make_document("d")], wrong)
    for dtype, number in (("int8", torch.inf), ("float16", 1e30), ("bfloat16", torch.nan)):
        other = MemoryFolder.create(path.parent / dtype, describe(dtype))
        keys = entries[7][0].clone()
        keys[1, 0, 5] = number
        with pytest.raises(MemoryFolderError, match=f"layer 7 are NaN or infinite in {dtype}"):
            other.append([make_document("d")], entries | {7: (keys, entries[7][1])})
    check_holds(folder, "abc")
    with pytest.raises(MemoryFolderError, match=r"no entries of layer 5; it has those of \[3, 7\]"):
        folder.open_layer(5)


def test_documents_that_contradict_themselves_are_refused() -> None:
    right = hash_text("abc")
    cases: list[tuple[tuple[Any, ...], str]] = [
        (("", 3, 3, right), "needs a name"),
        (("a", 3, 4, right), "at most one entry"),
        (("a", -1, -1, right), "at most one entry"),
        (("a", 3, 3, "abc"), "64 hexadecimal digits"),
        (("a", 3, 3, right, "abd"), "use hash_text"),
        (("a", 3, 3, right, None, [(0, 1)] * 3), "give both or none"),
        (("a", 3, 3, right, "abc", [(0, 1)] * 2), "token_offsets"),
        (("a", 3, 3, right, "abc", [(0, 4)] * 3), "from 0 to 3"),
        (("a", 3, 3, right, "abc", [(-1, 0)] * 3), "from 0 to 3"),
        (("a", 3, 2, right, "abc", None, [0, 3]), "from 0 to 2"),
        (("a", 3, 2, right, "abc", None, [0.0, 1.0]), "whole"),
        (("a", 3, 2, right, "abc", None, [1, 1]), "ascend"),
        (("a", 3, 2, right, "abc", None, [1]), "entry_tokens"),
    ]
    for values, message in cases:
        with pytest.raises(MemoryFolderError, match=message):
            NewDocument(*values)


@pytest.mark.parametrize(
    "values",
    [
        {"fingerprint": ""},
        {"layers": ()},
        {"layers": (7, 3)},
        {"layers": (-1,)},
        {"num_heads": 0},
        {"head_dim": 1.5},
        {"dtype": "float64"},
        {"settings": {"a": torch.nan}},
        {"settings": {"a": object()}},
    ],
)
def test_a_description_that_cannot_work_is_refused(values: dict[str, Any]) -> None:
    right = {"fingerprint": "a", "layers": LAYERS, "num_heads": HEADS, "head_dim": DIM}
    with pytest.raises(MemoryFolderError, match=next(iter(values))):
        FolderDescription(**right | values)


def flip(path: Path, place: int) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)
