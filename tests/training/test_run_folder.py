"""The folder of a run, of either kind."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from memorizing.config import Config, ModelConfig, TrainingConfig
from memorizing.errors import ConfigError, ResourceError, RunFolderError
from memorizing.training import list_checkpoints, read_run_config
from memorizing.training.finetuning.run import FINETUNING, read_description
from memorizing.training.run_folder import (
    TRAINING,
    RunFolder,
    RunKind,
    compare_settings,
    open_run,
    read_sessions,
    read_trained_dtype,
    record,
)

KINDS = pytest.mark.parametrize("kind", [TRAINING, FINETUNING], ids=["train", "finetune"])


def write_settings(kind: RunKind, content: str) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        (folder / kind.config_file).write_text(content)

    return write


def make_run(run_dir: Path, kind: RunKind, content: str = "old", **flags: bool) -> None:
    with open_run(run_dir, kind, **flags) as run:
        run.begin(write_settings(kind, content), {"precision": "fp32"})


def make_old_run(run_dir: Path, kind: RunKind) -> dict[str, str]:
    """A run with something of everything, and notes of its owner."""
    make_run(run_dir, kind)
    for name in ("metrics.jsonl", "log.txt", "notes.md"):
        (run_dir / name).write_text(f"old {name}")
    for step in (2, 3):
        (run_dir / f"checkpoints/step-00000{step}").mkdir(parents=True)
        (run_dir / f"checkpoints/step-00000{step}/weights").write_text(f"old {step}")
    return read_all(run_dir)


def read_all(folder: Path) -> dict[str, str]:
    """All files, links followed, but for the lock."""
    paths = [Path(root) / f for root, _, files in os.walk(folder, followlinks=True) for f in files]
    return {
        str(path.relative_to(folder)): path.read_text() for path in paths if path.name != "lock"
    }


@KINDS
def test_a_run_folder_describes_itself(kind: RunKind, tmp_path: Path) -> None:
    make_run(tmp_path / "run", kind)
    record(tmp_path / "run", {"commit": "abc"})
    [session] = json.loads((tmp_path / "run" / "run.json").read_text())["sessions"]
    assert {"started", "command", "processor", "threads", "python"} <= session.keys()
    assert session["packages"].keys() >= {"torch", "transformers"}
    assert (session["precision"], session["commit"]) == ("fp32", "abc")


@KINDS
def test_nothing_is_written_before_the_run_begins(kind: RunKind, tmp_path: Path) -> None:
    with open_run(tmp_path / "new" / "run", kind):
        pass
    assert list(tmp_path.iterdir()) == []
    before = make_old_run(tmp_path, kind)
    for flags in ({"resume": True}, {"overwrite": True}):
        with open_run(tmp_path, kind, **flags):
            pass
        with pytest.raises(ZeroDivisionError), open_run(tmp_path, kind, **flags) as run:
            raise ZeroDivisionError
        assert not run.has_begun
        assert read_all(tmp_path) == before


@KINDS
def test_an_existing_run_is_refused_and_left_alone(kind: RunKind, tmp_path: Path) -> None:
    before = make_old_run(tmp_path, kind)
    with pytest.raises(RunFolderError, match=r"--resume .* --overwrite"):
        make_run(tmp_path, kind)
    assert read_all(tmp_path) == before


@KINDS
@pytest.mark.parametrize("overwrite", [False, True])
def test_a_folder_that_is_no_run_is_never_touched(
    kind: RunKind, tmp_path: Path, overwrite: bool
) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(RunFolderError, match=f"is not a {kind.name}"):
        make_run(tmp_path, kind, overwrite=overwrite)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_run_of_the_other_kind_is_never_touched(tmp_path: Path, overwrite: bool) -> None:
    before = make_old_run(tmp_path, TRAINING)
    with pytest.raises(RunFolderError, match="is not a finetuning"):
        make_run(tmp_path, FINETUNING, overwrite=overwrite)
    assert read_all(tmp_path) == before


@pytest.mark.parametrize(
    "left",
    [
        "lock",
        ".config.toml.0123456789ab4123456789abcdef0123",
        ".memorizing-00000000-1-00000000.part",
    ],
)
@KINDS
def test_what_a_killed_run_left_does_not_make_a_folder_something_else(
    kind: RunKind, tmp_path: Path, left: str
) -> None:
    (tmp_path / left).write_text("")
    make_run(tmp_path, kind)
    names = {kind.config_file, "run.json", "lock"}
    assert {path.name for path in tmp_path.iterdir()} == names


def test_a_file_or_a_link_to_nothing_is_no_run_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for name in ("file", "file/run", "link"):
        with pytest.raises(RunFolderError, match="is a file"):
            make_run(tmp_path / name, TRAINING)


@KINDS
def test_overwriting_replaces_what_the_run_wrote_and_nothing_else(
    kind: RunKind, tmp_path: Path
) -> None:
    make_old_run(tmp_path, kind)
    make_run(tmp_path, kind, "new", overwrite=True)
    left = read_all(tmp_path)
    assert len(json.loads(left.pop("run.json"))["sessions"]) == 1
    assert left == {kind.config_file: "new", "notes.md": "old notes.md"}
    assert {path.name for path in tmp_path.iterdir()} == {
        kind.config_file, "run.json", "lock", "notes.md", "checkpoints"
    }  # fmt: skip


@KINDS
def test_a_link_to_checkpoints_elsewhere_stays_and_what_it_leads_to_is_replaced(
    kind: RunKind, tmp_path: Path
) -> None:
    disk, run_dir = tmp_path / "disk", tmp_path / "run"
    make_old_run(run_dir, kind)
    (run_dir / "checkpoints").rename(disk)
    (run_dir / "checkpoints").symlink_to(disk)
    (disk / "readme").write_text("of the disk")
    make_run(run_dir, kind, "new", overwrite=True)
    assert (run_dir / "checkpoints").is_symlink()
    assert list_checkpoints(run_dir) == []
    assert read_all(disk) == {"readme": "of the disk"}


@pytest.mark.parametrize("is_link", [True, False])
@KINDS
def test_checkpoints_that_cannot_be_written_are_refused_before_anything_goes(
    kind: RunKind, tmp_path: Path, is_link: bool
) -> None:
    make_run(tmp_path, kind)
    if is_link:
        (tmp_path / "checkpoints").symlink_to(tmp_path / "nowhere")
    else:
        (tmp_path / "checkpoints").write_text("")
    for flags in ({"resume": True}, {"overwrite": True}):
        with pytest.raises(RunFolderError, match="a link that leads nowhere"):
            make_run(tmp_path, kind, "new", **flags)
    assert (tmp_path / kind.config_file).read_text() == "old"


class Killed(BaseException):
    """Stands for a kill: no handler of the code under test is for it."""


def count_calls(monkeypatch: pytest.MonkeyPatch, die_at: int) -> list[str]:
    """Let the process "die" before its n-th change of a name."""
    calls: list[str] = []
    for owner, name in ((os, "rename"), (os, "replace"), (os, "mkdir")):
        real = getattr(owner, name)

        def call(*args: Any, real: Any = real, name: str = name, **kwargs: Any) -> Any:
            calls.append(name)
            if len(calls) == die_at:
                raise Killed
            return real(*args, **kwargs)

        monkeypatch.setattr(owner, name, call)
    return calls


@KINDS
def test_an_overwriting_killed_anywhere_leaves_the_old_run_or_the_new_one(
    kind: RunKind, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    outcomes = []
    for die_at in range(1, 100):
        run_dir = tmp_path / str(die_at)
        before = make_old_run(run_dir, kind)
        with monkeypatch.context() as patch:
            patch.setattr(RunFolder, "restore", lambda self: None)  # a kill restores nothing
            calls = count_calls(patch, die_at)
            with contextlib.suppress(Killed):
                make_run(run_dir, kind, "new", overwrite=True)
            is_done = len(calls) < die_at
        with open_run(run_dir, kind, resume=True):
            pass
        left = read_all(run_dir)
        outcomes.append(left[kind.config_file])
        if left[kind.config_file] == "old":
            assert left == before
        else:
            assert [name for name in left if left[name].startswith("old")] == ["notes.md"]
        if is_done:
            break
    assert outcomes[0] == "old"
    assert outcomes[-1] == "new"
    assert len(outcomes) > 9
    assert outcomes == sorted(outcomes, reverse=True)


@KINDS
def test_an_overwriting_that_cannot_write_puts_the_old_run_back(
    kind: RunKind, tmp_path: Path
) -> None:
    before = make_old_run(tmp_path, kind)

    def fail(folder: Path) -> None:
        (folder / kind.config_file).write_text("half")
        raise OSError(28, "No space left on device")

    with (
        open_run(tmp_path, kind, overwrite=True) as run,
        pytest.raises(ResourceError, match="no space left"),
    ):
        run.begin(fail, {})
    assert read_all(tmp_path) == before


@pytest.fixture(params=[{}, {"resume": True}, {"overwrite": True}], ids=["new", "resume", "over"])
def flags(request: pytest.FixtureRequest) -> Iterator[dict[str, bool]]:
    return request.param


@pytest.mark.parametrize("has_begun", [True, False])
@KINDS
def test_a_run_that_is_live_is_nobody_elses(
    kind: RunKind, tmp_path: Path, flags: dict[str, bool], has_begun: bool
) -> None:
    if has_begun:
        make_run(tmp_path, kind)
    elif flags:
        pytest.skip("there is nothing yet to resume or overwrite")
    before = read_all(tmp_path)
    with open_run(tmp_path, kind, overwrite=has_begun):
        with pytest.raises(RunFolderError, match=f"process {os.getpid()} on .*stop it"):
            make_run(tmp_path, kind, "new", **flags)
        assert read_all(tmp_path) == before
    if flags or not has_begun:
        make_run(tmp_path, kind, "new", **flags)  # it is free again


def test_resuming_adds_a_session(tmp_path: Path) -> None:
    make_run(tmp_path, TRAINING)
    make_run(tmp_path, TRAINING, resume=True)
    assert len(read_sessions(tmp_path)) == 2


def test_products_are_those_of_the_last_session(tmp_path: Path) -> None:
    for sessions, dtype in ((["fp32", "bf16"], torch.bfloat16), (["bf16", "fp32"], torch.float32)):
        values = {"sessions": [{"precision": name} for name in sessions]}
        (tmp_path / "run.json").write_text(json.dumps(values))
        assert read_trained_dtype(tmp_path) == dtype


@KINDS
def test_nothing_cannot_be_resumed(kind: RunKind, tmp_path: Path) -> None:
    for folder in (tmp_path / "absent", tmp_path):
        with pytest.raises(RunFolderError, match=f"no {kind.name} to resume"):
            make_run(folder, kind, resume=True)
    assert list(tmp_path.iterdir()) == []


def test_resume_and_overwrite_exclude_each_other(tmp_path: Path) -> None:
    with pytest.raises(RunFolderError, match="exclude each other"):
        make_run(tmp_path, TRAINING, resume=True, overwrite=True)


@pytest.mark.parametrize(
    "content",
    [
        b'{"sessions": [{"started": "2',
        b"",
        b"[]",
        b"{}",
        b'{"sessions": [1]}',
        b'{"sessions": {}}',
        b"\xff",
        b"[" * 100_000,
    ],
)
@KINDS
def test_a_damaged_history_of_sessions_is_told_before_the_run_goes_on(
    kind: RunKind, tmp_path: Path, content: bytes
) -> None:
    make_run(tmp_path, kind)
    (tmp_path / "run.json").write_bytes(content)
    with pytest.raises(RunFolderError, match=r"run\.json.*delete it"):
        make_run(tmp_path, kind, "new", resume=True)
    assert (tmp_path / kind.config_file).read_text() == "old"
    (tmp_path / "run.json").unlink()
    make_run(tmp_path, kind, resume=True)


def make_config(**training: Any) -> dict[str, Any]:
    return Config(name="tiny", training=TrainingConfig(**{"rows": 6, **training})).to_dict()


def test_a_run_is_not_resumed_with_another_batch() -> None:
    with pytest.raises(ConfigError, match=r"training\.rows was 6 and is 8"):
        compare_settings(make_config(), make_config(rows=8), TRAINING.must_stay)


def test_a_resumed_run_may_have_another_rate_and_says_so() -> None:
    changes = compare_settings(
        make_config(learning_rate=0.5), make_config(learning_rate=0.25), TRAINING.must_stay
    )
    assert changes == ["training.learning_rate was 0.5 and is 0.25"]


@pytest.mark.parametrize(
    "content", [b"[training", b"\xff", b"x = " + b"[" * 100_000, b"[model]\nnum_layers = 'x'\n"]
)
def test_a_broken_configuration_is_told(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "config.toml").write_bytes(content)
    with pytest.raises(RunFolderError, match=r"config\.toml cannot be read"):
        read_run_config(tmp_path)
    with pytest.raises(RunFolderError, match="is not a run"):
        read_run_config(tmp_path / "absent")


@pytest.mark.parametrize(
    "content", [b"{", b"\xff", b'{"a":' * 100_000, b'{"memory": 3, "finetune": {}, "heads": {}}']
)
def test_a_broken_description_of_a_finetuning_is_told(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "finetune.json").write_bytes(content)
    with pytest.raises(RunFolderError, match=r"finetune\.json.*restore the file"):
        read_description(tmp_path)


def test_a_configuration_is_read_back(tmp_path: Path) -> None:
    config = Config(name="tiny", model=replace(ModelConfig(), vocab_size=299))
    (tmp_path / "config.toml").write_text(config.to_toml())
    assert read_run_config(tmp_path) == config
