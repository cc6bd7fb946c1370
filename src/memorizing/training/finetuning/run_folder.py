"""The folder of a finetuning: what it holds describes itself."""

from __future__ import annotations

import json
import shutil
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from memorizing.errors import ConfigError, RunFolderError
from memorizing.storage.files import write_json
from memorizing.training.checkpoints import CHECKPOINT_FOLDER
from memorizing.training.run_folder import (
    LOG_FILE,
    METRICS_FILE,
    RUN_FILE,
    TENSORBOARD_FOLDER,
    describe_machine,
)

SETTINGS_FILE = "finetune.json"
RESULT_FOLDER = "adapter"
_OURS = (
    SETTINGS_FILE,
    RUN_FILE,
    METRICS_FILE,
    LOG_FILE,
    TENSORBOARD_FOLDER,
    CHECKPOINT_FOLDER,
    RESULT_FOLDER,
)
_MAY_CHANGE = (
    "steps",
    "log_every",
    "evaluate_every",
    "evaluate_tokens",
    "checkpoint_every",
    "keep_checkpoints",
)
"""Settings that a resumed run may have others of."""


def prepare_run_folder(
    run_dir: Path, description: dict[str, Any], *, resume: bool = False, overwrite: bool = False
) -> list[str]:
    """Make or empty the folder of a run; write its settings, and a session in `run.json`.

    Args:
        run_dir: the folder.
        description: `finetune` and `memory` settings, `heads` as they begin, and what else is good
            to know.
        resume: the folder must hold a run with the same settings, but for a few.
        overwrite: the folder may hold a run. What finetuning wrote there is deleted.

    Returns:
        A line for every setting that a resumed run has another value of.

    Raises:
        RunFolderError: the folder holds something and neither flag is given; it is not a run; or
            there is no run to resume.
        ConfigError: resumed with other settings, each named.
    """
    changes: list[str] = []
    if resume and overwrite:
        raise RunFolderError("resume and overwrite exclude each other; give one of them")
    nearest = next(p for p in (run_dir, *run_dir.absolute().parents) if p.exists())
    if not nearest.is_dir():
        raise RunFolderError(f"{nearest} is a file; give the run a folder")
    is_run = (run_dir / SETTINGS_FILE).is_file()
    if resume:
        before = read_description(run_dir)
        changes = _compare(before, description)
        description = {**description, "heads": before.get("heads", description["heads"])}
    elif run_dir.exists() and any(run_dir.iterdir()):
        if not is_run:
            raise RunFolderError(
                f"{run_dir} exists and is not a finetuning; give the run a new or empty folder"
            )
        if not overwrite:
            raise RunFolderError(
                f"{run_dir} holds a run already; use --resume to continue it, --overwrite to "
                "replace it, or another folder"
            )
        for path in (run_dir / name for name in _OURS):
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)
    run_dir.mkdir(parents=True, exist_ok=True)
    write_json(run_dir / SETTINGS_FILE, description)
    sessions = _read_json(run_dir / RUN_FILE).get("sessions", []) if resume else []
    session = {"started": datetime.now(UTC).isoformat(timespec="seconds"), **describe_machine()}
    write_json(run_dir / RUN_FILE, {"sessions": [*sessions, session]})
    return changes


def read_description(run_dir: Path) -> dict[str, Any]:
    """What a run was started with.

    Raises:
        RunFolderError: the folder is no finetuning, or its description cannot be read.
    """
    path = Path(run_dir) / SETTINGS_FILE
    if not path.is_file():
        raise RunFolderError(
            f"{run_dir} holds no finetuning to resume (no {SETTINGS_FILE}); leave out --resume to "
            "start one"
        )
    return _read_json(path)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise RunFolderError(
            f"{path} cannot be read ({error}); restore the file that finetuning wrote"
        ) from error
    return values if isinstance(values, dict) else {}


def _compare(saved: dict[str, Any], wanted: dict[str, Any]) -> list[str]:
    changed: dict[str, str] = {}
    for table in ("finetune", "memory"):
        old = saved.get(table, {})
        for key, value in json.loads(json.dumps(wanted.get(table, {}))).items():
            if old.get(key) != value:
                changed[key] = f"{table}.{key} was {old.get(key)!r} and is {value!r}"
    refused = [line for key, line in changed.items() if key not in _MAY_CHANGE]
    if refused:
        raise ConfigError(
            f"a run resumes with the settings it was started with, but {'; '.join(refused)}; "
            "restore them or start a new run"
        )
    return list(changed.values())
