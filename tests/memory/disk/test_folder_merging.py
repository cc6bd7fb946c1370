"""Several memories become one."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from memorizing.errors import MemoryFolderError
from memorizing.memory import MemoryFolder, NewDocument, hash_text
from memorizing.memory.disk import state
from tests.memory.disk.examples import (
    DIM,
    HEADS,
    LAYERS,
    append,
    check_holds,
    describe,
    list_files,
    make_folder,
    write_text,
)


@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
@pytest.mark.parametrize("most", [1, 53, 10_000])
def test_documents_of_all_are_kept_once_with_their_names_and_texts(
    dtype: str, most: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(state, "SMALL_SEGMENT", 1)
    paths = [tmp_path / name for name in ("one", "other", "empty", "third")]
    for path, names in zip(paths, (["a", "bb", "c"], ["d", "c"], [], ["a", "e"]), strict=True):
        folder = make_folder(path, dtype=dtype)
        for name in names:
            append(folder, [name], keep_text=name != "e")
    monkeypatch.setattr("memorizing.memory.disk.state.LARGEST_JOINED", most)
    before = [list_files(path) for path in paths]
    merged = MemoryFolder.merge(paths, tmp_path / "deep" / "merged")
    names = ["a", "bb", "c", "d", "e"]
    check_holds(merged, names)
    check_holds(MemoryFolder.open(merged.path, fingerprint="of a model"), names)
    assert merged.contents.read_text("d") == write_text("d")
    assert merged.description.settings == {"top": 3}
    assert len(merged.contents.segments) == {1: 5, 53: 2, 10_000: 1}[most]
    assert before == [list_files(path) for path in paths]
    append(merged, ["f"])
    check_holds(MemoryFolder.open(merged.path), [*names, "f"])


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("fingerprint", "of another"),
        ("layers", (3, 5)),
        ("num_heads", 1),
        ("head_dim", 11),
        ("dtype", "int8"),
        ("settings", {"top": 5}),
    ],
)
def test_memories_of_other_models_or_shapes_are_not_merged(
    name: str, value: Any, tmp_path: Path
) -> None:
    make_folder(tmp_path / "one", ["a"])
    MemoryFolder.create(tmp_path / "other", replace(describe(), **{name: value}))
    with pytest.raises(MemoryFolderError, match=f"one.* {name}"):
        MemoryFolder.merge([tmp_path / "one", tmp_path / "other"], tmp_path / "merged")
    assert list_files(tmp_path) == ["one", "other"]


def test_settings_that_differ_can_be_given_anew(tmp_path: Path) -> None:
    make_folder(tmp_path / "one", ["a"])
    MemoryFolder.create(tmp_path / "other", replace(describe(), settings={}))
    merged = MemoryFolder.merge(
        [tmp_path / "one", tmp_path / "other"], tmp_path / "merged", {"top": 7}
    )
    assert merged.description.settings == {"top": 7}
    check_holds(merged, ["a"])


def test_one_name_of_two_texts_is_refused_with_what_to_do(tmp_path: Path) -> None:
    make_folder(tmp_path / "one", ["a"])
    other = make_folder(tmp_path / "other")
    entry = torch.zeros(HEADS, 1, DIM)
    other.append(
        [NewDocument("a", 1, 1, hash_text("other"))], dict.fromkeys(LAYERS, (entry, entry))
    )
    with pytest.raises(MemoryFolderError, match=r"'a', with different texts; forget it in one"):
        MemoryFolder.merge([tmp_path / "one", other.path], tmp_path / "merged")
    assert list_files(tmp_path) == ["one", "other"]


def test_a_merged_memory_needs_sources_and_a_free_place(tmp_path: Path) -> None:
    make_folder(tmp_path / "one", ["a"])
    with pytest.raises(MemoryFolderError, match="name one or more"):
        MemoryFolder.merge([], tmp_path / "merged")
    with pytest.raises(MemoryFolderError, match="holds a memory already"):
        MemoryFolder.merge([tmp_path / "one"], tmp_path / "one")
    with pytest.raises(MemoryFolderError, match="holds no memory"):
        MemoryFolder.merge([tmp_path / "none"], tmp_path / "merged")
    (tmp_path / "merged").mkdir()
    (tmp_path / "merged" / "lock").touch()
    check_holds(MemoryFolder.merge([tmp_path / "one"], tmp_path / "merged"), ["a"])


def test_a_link_under_a_temporary_name_is_not_followed(tmp_path: Path) -> None:
    make_folder(tmp_path / "one", ["a"])
    make_folder(tmp_path / "other", ["b"])
    (tmp_path / ".merged.part").symlink_to("other")
    MemoryFolder.merge([tmp_path / "one"], tmp_path / "merged")
    check_holds(MemoryFolder.open(tmp_path / "other"), ["b"])
    assert (tmp_path / ".merged.part").is_symlink()


def test_what_an_earlier_release_left_of_a_merge_is_removed_and_other_folders_are_not(
    tmp_path: Path,
) -> None:
    make_folder(tmp_path / "one", ["a"])
    for files, is_ours in (
        (["lock", ".segment-000000.safetensors.part"], True),
        (["lock", "segment-000000.safetensors", ".manifest.json.part"], True),
        (["lock", "segment-000000.safetensors", "thesis.tex"], False),
    ):
        left = tmp_path / ".merged.part"
        left.mkdir()
        for name in files:
            (left / name).write_text("half")
        MemoryFolder.merge([tmp_path / "one"], tmp_path / "merged")
        assert left.exists() is not is_ours
        shutil.rmtree(tmp_path / "merged")


def test_a_merge_into_a_link_makes_the_folder_that_it_leads_to(tmp_path: Path) -> None:
    make_folder(tmp_path / "one", ["a"])
    (tmp_path / "link").symlink_to("deep/merged")
    MemoryFolder.merge([tmp_path / "one"], tmp_path / "link")
    check_holds(MemoryFolder.open(tmp_path / "deep" / "merged"), ["a"])
    assert list_files(tmp_path) == ["deep", "link", "one"]
