"""What cannot be right is refused before it is used: what was seen, and what to do."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from memorizing.errors import MemoryFolderError
from memorizing.memory import (
    MemoryFolder,
)
from tests.memory.disk.examples import (
    check_holds,
    describe,
    list_files,
)


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
