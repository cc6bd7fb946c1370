"""What one memory takes over of another is there, and nothing of the other is left."""

from __future__ import annotations

from pathlib import Path

import pytest

from memorizing.errors import MemoryFolderError
from memorizing.memory import MemoryFolder
from memorizing.memory.disk import state
from tests.memory.disk.examples import append, check_holds, describe, list_files, make_folder


@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
def test_small_parts_are_joined(tmp_path: Path, dtype: str):
    folder = make_folder(tmp_path / "whole", ["a"], dtype=dtype)
    make_folder(tmp_path / "part", ["b", "c"], dtype=dtype)
    taken = folder.take_over(tmp_path / "part")
    assert [one.name for one in taken] == ["b", "c"]
    check_holds(MemoryFolder.open(folder.path), ["a", "b", "c"])
    assert len(folder.contents.segments) == 1
    assert list_files(tmp_path) == ["whole"]
    folder.verify()


def test_parts_that_are_not_joined_are_moved_and_not_written(tmp_path, monkeypatch):
    monkeypatch.setattr(state, "SMALL_SEGMENT", 0)
    monkeypatch.setattr(state, "LARGEST_JOINED", 0)
    folder = make_folder(tmp_path / "whole", ["a"])
    part = make_folder(tmp_path / "part", ["b"], ["c", "d"])
    files = [segment.path.stat().st_ino for segment in part.contents.segments]
    folder.take_over(part.path)
    moved = [segment.path.stat().st_ino for segment in folder.contents.segments][1:]
    assert (len(files), moved) == (2, files)
    check_holds(MemoryFolder.open(folder.path), ["a", "b", "c", "d"])
    folder.verify()
    folder.forget("c")
    check_holds(folder, ["a", "b", "d"])
    assert list_files(tmp_path) == ["whole"]


def test_documents_of_the_same_names_are_replaced(tmp_path: Path):
    folder = make_folder(tmp_path / "whole", ["a", "b"])
    make_folder(tmp_path / "part", ["b", "c"])
    folder.take_over(tmp_path / "part")
    check_holds(folder, ["a", "b", "c"])


def test_an_empty_part_adds_nothing(tmp_path: Path):
    folder = make_folder(tmp_path / "whole", ["a"])
    MemoryFolder.create(tmp_path / "part", describe())
    assert folder.take_over(tmp_path / "part") == ()
    check_holds(folder, ["a"])


def test_entries_of_another_kind_are_refused_and_stay(tmp_path: Path):
    folder = make_folder(tmp_path / "whole", ["a"])
    other = make_folder(tmp_path / "other", ["b"], dtype="float16")
    with pytest.raises(MemoryFolderError, match="only memories of one model"):
        folder.take_over(other.path)
    check_holds(folder, ["a"])
    check_holds(other, ["b"])
    append(other, ["c"])
