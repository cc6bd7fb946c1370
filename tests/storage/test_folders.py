"""Folders that are whole or not there."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import pytest

from memorizing.errors import CheckpointError, ResourceError
from memorizing.storage import folders
from memorizing.storage.folders import verify_folder, write_folder
from tests.storage.test_files import DEEP, leave_behind, list_names


def write_two(folder: Path, text: str) -> None:
    def write(partial: Path) -> None:
        for name in ("a", "b"):
            (partial / name).write_text(text)

    write_folder(folder, write)


def read_two(folder: Path) -> str:
    verify_folder(folder)
    (text,) = {(folder / name).read_text() for name in ("a", "b")}
    return text


@pytest.fixture(params=["exchanged", "renamed twice"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both ways to replace a folder, whatever this system can."""
    if request.param != "exchanged":
        monkeypatch.setattr(folders, "_exchange", lambda first, second: False)


@pytest.mark.usefixtures("way")
def test_a_folder_is_replaced_whole(tmp_path: Path) -> None:
    for text in ("old", "new"):
        write_two(tmp_path / "x", text)
        assert read_two(tmp_path / "x") == text
    assert list_names(tmp_path) == ["x"]
    assert list_names(tmp_path / "x") == ["a", "b", "manifest.json"]


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("ours", [("a", "gone"), None])
def test_what_is_not_ours_stays_where_that_is_wanted(
    ours: tuple[str, ...] | None, tmp_path: Path
) -> None:
    path = tmp_path / "x"
    write_two(path, "old")
    (path / "gone").write_text("ours")
    (path / "notes" / "deep").mkdir(parents=True)
    (path / "notes" / "deep" / "text").write_text("mine")
    (path / "link").symlink_to("notes")
    write_folder(path, lambda partial: (partial / "a").write_text("new") and None, ours=ours)
    kept = ["b", "link", "notes"] if ours else []
    assert list_names(path) == sorted(["a", *kept, "manifest.json"])
    assert (path / "a").read_text() == "new"
    if ours:
        assert (path / "link" / "deep" / "text").read_text() == "mine"
        assert (path / "link").is_symlink()
        verify_folder(path)
    assert list_names(tmp_path) == ["x"]


@pytest.mark.usefixtures("way")
def test_an_error_leaves_the_old_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_two(tmp_path / "x", "old")

    def fail(partial: Path) -> None:
        (partial / "a").write_text("new")
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(ResourceError, match="no space left"):
        write_folder(tmp_path / "x", fail)
    with pytest.raises(ResourceError, match="MiB are free"):
        write_folder(tmp_path / "x", fail, 2**60)
    (tmp_path / "file").write_text("x")
    with pytest.raises(ResourceError, match="cannot write"):
        write_two(tmp_path / "file" / "x", "new")
    assert read_two(tmp_path / "x") == "old"
    assert list_names(tmp_path) == ["file", "x"]


@pytest.mark.usefixtures("way")
def test_a_link_to_a_folder_is_followed(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("there/x")
    for text in ("old", "new"):
        write_two(tmp_path / "link", text)
        assert read_two(tmp_path / "there" / "x") == text
    assert (tmp_path / "link").is_symlink()
    assert list_names(tmp_path / "there") == ["x"]


def test_leftovers_beside_a_folder_are_removed_when_one_is_written(tmp_path: Path) -> None:
    leave_behind(tmp_path)
    leave_behind(tmp_path, content=None)
    (tmp_path / ".partial-replaced-mine").mkdir()
    write_two(tmp_path / "x", "new")
    assert list_names(tmp_path) == [".partial-replaced-mine", "x"]


def test_damage_is_found_and_named(tmp_path: Path) -> None:
    write_two(tmp_path / "x", "text")
    (tmp_path / "x" / "a").write_text("tent")
    with pytest.raises(CheckpointError, match="SHA-256"):
        verify_folder(tmp_path / "x")
    verify_folder(tmp_path / "x", ["b"])
    (tmp_path / "x" / "a").write_text("tex")
    with pytest.raises(CheckpointError, match="has 3 bytes and was written with 4"):
        verify_folder(tmp_path / "x", ["a"])
    (tmp_path / "x" / "a").unlink()
    for names in (["a"], ["c"], None):
        with pytest.raises(CheckpointError, match="has no file"):
            verify_folder(tmp_path / "x", names)
    (tmp_path / "x" / "manifest.json").unlink()
    with pytest.raises(CheckpointError, match=r"no manifest\.json"):
        verify_folder(tmp_path / "x")
    verify_folder(tmp_path / "x", ["b"], may_lack_manifest=True)
    with pytest.raises(CheckpointError, match="has no file 'c'"):
        verify_folder(tmp_path / "x", ["c"], may_lack_manifest=True)


@pytest.mark.parametrize(
    "files",
    [
        None,
        [],
        {"a": None},
        {"a": {"bytes": "4", "sha256": ""}},
        {"a": {"bytes": 4}},
        {"../x/a": {"bytes": 4, "sha256": ""}},
        {"/etc/passwd": {"bytes": 4, "sha256": ""}},
    ],
)
def test_a_manifest_that_was_edited_is_refused(files: object, tmp_path: Path) -> None:
    write_two(tmp_path / "x", "text")
    manifest = {"format_version": 1, "files": files}
    (tmp_path / "x" / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match="was altered"):
        verify_folder(tmp_path / "x")
    (tmp_path / "x" / "manifest.json").write_bytes(DEEP)
    with pytest.raises(CheckpointError, match="recursion"):
        verify_folder(tmp_path / "x")


def test_everything_is_on_the_disk_before_the_folder_has_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []
    sync, rename = os.fsync, os.rename

    def log_sync(descriptor: int) -> None:
        calls.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")).name.partition("-")[0])
        sync(descriptor)

    def log_rename(source: Path, target: Path) -> None:
        calls.append(f"name {target.name}")
        rename(source, target)

    monkeypatch.setattr(os, "fsync", log_sync)
    monkeypatch.setattr(os, "rename", log_rename)
    write_two(tmp_path / "x", "text")
    monkeypatch.undo()
    # The manifest under its temporary name, its folder, the files, their folder.
    assert calls[:-2] == [".memorizing", ".memorizing", "a", "b", ".memorizing"]
    assert calls[-2:] == ["name x", tmp_path.name]
