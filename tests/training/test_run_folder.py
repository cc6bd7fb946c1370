from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from memorizing.config import Config, ModelConfig, TrainingConfig
from memorizing.errors import ConfigError, RunFolderError
from memorizing.training import read_run_config
from memorizing.training.run_folder import check_run_folder, create_run_folder, record


def make_config(**training: object) -> Config:
    values = {"rows": 6, **training}
    return Config(name="tiny", training=TrainingConfig(**values))  # type: ignore[arg-type]


def test_a_run_folder_describes_itself(tmp_path: Path) -> None:
    config = make_config(learning_rate=0.03)
    create_run_folder(tmp_path / "run", config)
    record(tmp_path / "run", {"precision": "fp32"})
    assert read_run_config(tmp_path / "run") == config
    [session] = json.loads((tmp_path / "run" / "run.json").read_text())["sessions"]
    assert {"started", "command", "processor", "threads", "commit", "python"} <= session.keys()
    assert session["packages"].keys() >= {"torch", "transformers"}
    assert session["precision"] == "fp32"


def test_an_empty_folder_may_be_used(tmp_path: Path) -> None:
    assert check_run_folder(tmp_path, make_config()) == []


def test_an_existing_run_is_refused_and_left_alone(tmp_path: Path) -> None:
    create_run_folder(tmp_path, make_config())
    (tmp_path / "metrics.jsonl").write_text("kept")
    with pytest.raises(RunFolderError, match=r"--resume .* --overwrite"):
        create_run_folder(tmp_path, make_config())
    assert (tmp_path / "metrics.jsonl").read_text() == "kept"


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_folder_that_is_no_run_is_never_touched(tmp_path: Path, overwrite: bool) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(RunFolderError, match="is not a run"):
        create_run_folder(tmp_path, make_config(), overwrite=overwrite)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_file_is_no_run_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RunFolderError, match="is a file"):
        check_run_folder(tmp_path / "file", make_config())


def test_overwriting_deletes_what_training_wrote_and_nothing_else(tmp_path: Path) -> None:
    create_run_folder(tmp_path, make_config())
    (tmp_path / "checkpoints" / "step-000003").mkdir(parents=True)
    for name in ("metrics.jsonl", "log.txt", "notes.md"):
        (tmp_path / name).write_text("old")
    create_run_folder(tmp_path, make_config(seed=5), overwrite=True)
    assert {path.name for path in tmp_path.iterdir()} == {"config.toml", "run.json", "notes.md"}
    assert read_run_config(tmp_path).training.seed == 5
    assert len(json.loads((tmp_path / "run.json").read_text())["sessions"]) == 1


def test_resuming_adds_a_session(tmp_path: Path) -> None:
    create_run_folder(tmp_path, make_config())
    create_run_folder(tmp_path, make_config(), resume=True)
    assert len(json.loads((tmp_path / "run.json").read_text())["sessions"]) == 2


def test_nothing_cannot_be_resumed(tmp_path: Path) -> None:
    with pytest.raises(RunFolderError, match="no run to resume"):
        check_run_folder(tmp_path / "absent", make_config(), resume=True)


def test_resume_and_overwrite_exclude_each_other(tmp_path: Path) -> None:
    with pytest.raises(RunFolderError, match="exclude each other"):
        check_run_folder(tmp_path, make_config(), resume=True, overwrite=True)


def test_a_run_is_not_resumed_with_another_batch(tmp_path: Path) -> None:
    create_run_folder(tmp_path, make_config())
    with pytest.raises(ConfigError, match=r"training\.rows was 6 and is 8"):
        check_run_folder(tmp_path, make_config(rows=8), resume=True)


def test_a_resumed_run_may_have_another_rate_and_says_so(tmp_path: Path) -> None:
    create_run_folder(tmp_path, make_config(learning_rate=0.5))
    changes = check_run_folder(tmp_path, make_config(learning_rate=0.25), resume=True)
    assert changes == ["training.learning_rate was 0.5 and is 0.25"]


def test_the_vocabulary_that_the_tokenizer_gave_is_no_other_setting(tmp_path: Path) -> None:
    recipe = make_config()
    create_run_folder(tmp_path, replace(recipe, model=ModelConfig(vocab_size=299)))
    assert check_run_folder(tmp_path, recipe, resume=True) == []


def test_a_broken_configuration_is_told(tmp_path: Path) -> None:
    (tmp_path / "config.toml").write_text("[training")
    with pytest.raises(RunFolderError, match=r"config\.toml cannot be read"):
        read_run_config(tmp_path)
    with pytest.raises(RunFolderError, match="is not a run"):
        read_run_config(tmp_path / "absent")
