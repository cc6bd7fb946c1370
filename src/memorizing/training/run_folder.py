"""The folder of a run: what it holds describes itself."""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from memorizing import __version__
from memorizing.config import Config
from memorizing.errors import ConfigError, MemorizingError, RunFolderError
from memorizing.storage.files import write_bytes
from memorizing.training.checkpoints import CHECKPOINT_FOLDER

CONFIG_FILE = "config.toml"
RUN_FILE = "run.json"
METRICS_FILE = "metrics.jsonl"
LOG_FILE = "log.txt"
TENSORBOARD_FOLDER = "tensorboard"
_OURS = (
    CONFIG_FILE,
    RUN_FILE,
    METRICS_FILE,
    LOG_FILE,
    "tokenizer.json",
    TENSORBOARD_FOLDER,
    CHECKPOINT_FOLDER,
)

_MUST_STAY = (
    "model.",
    "tokenizer.",
    "data.",
    "training.rows",
    "training.accumulation",
    "training.optimizer",
    "training.precision",
    "training.seed",
    "training.start_from",
)
"""Settings that a run resumes with; the others may change, and the change is said."""
_MEASURED = "model.vocab_size"
"""A run has its tokenizer's vocabulary, whatever the recipe says."""
_PACKAGES = ("torch", "transformers", "tokenizers", "safetensors", "numpy")


def check_run_folder(
    run_dir: Path, config: Config, *, resume: bool = False, overwrite: bool = False
) -> list[str]:
    """Refuse a folder that a run cannot use. Writes nothing.

    Args:
        run_dir: the folder.
        config: the whole configuration of the run.
        resume: the folder must hold a run of the same model, data, batch, optimizer, precision and
            seed.
        overwrite: the folder may hold a run.

    Returns:
        A line for every setting that a resumed run has another value of.

    Raises:
        RunFolderError: the folder holds something and neither flag is given; it is not a run; or
            there is no run to resume.
        ConfigError: resumed with other settings, each named.
    """
    is_run = (run_dir / CONFIG_FILE).is_file()
    if resume and overwrite:
        raise RunFolderError("resume and overwrite exclude each other; give one of them")
    nearest = next(p for p in (run_dir, *run_dir.absolute().parents) if p.exists())
    if not nearest.is_dir():
        raise RunFolderError(f"{nearest} is a file; give the run a folder")
    if resume:
        if not is_run:
            raise RunFolderError(
                f"{run_dir} holds no run to resume (no {CONFIG_FILE}); leave out --resume to start "
                "one"
            )
        return _compare(read_run_config(run_dir), config)
    if run_dir.exists() and any(run_dir.iterdir()):
        if not is_run:
            raise RunFolderError(
                f"{run_dir} exists and is not a run; give the run a new or empty folder"
            )
        if not overwrite:
            raise RunFolderError(
                f"{run_dir} holds a run already; use --resume to continue it, --overwrite to "
                "replace it, or another folder"
            )
    return []


def create_run_folder(
    run_dir: Path, config: Config, *, resume: bool = False, overwrite: bool = False
) -> None:
    """Make or empty the folder of a run; write its configuration and a session in `run.json`.

    With `overwrite` what training wrote there is deleted; other files stay.
    """
    check_run_folder(run_dir, config, resume=resume, overwrite=overwrite)
    if overwrite:
        for path in (run_dir / name for name in _OURS):
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)
    run_dir.mkdir(parents=True, exist_ok=True)
    write_bytes(run_dir / CONFIG_FILE, config.to_toml().encode())
    sessions = _read_sessions(run_dir)
    sessions.append(
        {"started": datetime.now(UTC).isoformat(timespec="seconds"), **describe_machine()}
    )
    _write_sessions(run_dir, sessions)


def read_run_config(run_dir: Path) -> Config:
    """The configuration of a run.

    Raises:
        RunFolderError: the folder is not a run, or its configuration cannot be read.
    """
    path = Path(run_dir) / CONFIG_FILE
    try:
        return Config.from_dict(tomllib.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError as error:
        raise RunFolderError(
            f"{run_dir} is not a run: it has no {CONFIG_FILE}; give the folder of a training run"
        ) from error
    except (OSError, ValueError, MemorizingError) as error:
        raise RunFolderError(
            f"{path} cannot be read ({error}); restore the file that training wrote"
        ) from error


def record(run_dir: Path, values: dict[str, Any]) -> None:
    """Add values to the present session in `run.json`."""
    sessions = _read_sessions(run_dir)
    sessions[-1].update(values)
    _write_sessions(run_dir, sessions)


def describe_machine() -> dict[str, Any]:
    """Versions, source commit, command, processor: what is needed to repeat a run."""
    return {
        "memorizing": __version__,
        "python": platform.python_version(),
        "packages": {name: metadata.version(name) for name in _PACKAGES},
        "commit": _find_commit(),
        "command": sys.argv,
        "system": platform.platform(),
        "processor": _find_processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
    }


def _read_sessions(run_dir: Path) -> list[dict[str, Any]]:
    try:
        return json.loads((run_dir / RUN_FILE).read_text(encoding="utf-8"))["sessions"]
    except FileNotFoundError:
        return []
    except (OSError, ValueError, KeyError) as error:
        raise RunFolderError(
            f"{run_dir / RUN_FILE} cannot be read ({error}); delete it to go on without its history"
        ) from error


def _write_sessions(run_dir: Path, sessions: list[dict[str, Any]]) -> None:
    write_bytes(run_dir / RUN_FILE, json.dumps({"sessions": sessions}, indent=2).encode())


def _compare(saved: Config, wanted: Config) -> list[str]:
    old, new = _flatten(saved.to_dict()), _flatten(wanted.to_dict())
    changed = {
        key: f"{key} was {old[key]!r} and is {new[key]!r}"
        for key in new
        if new[key] != old[key] and key != _MEASURED
    }
    refused = [line for key, line in changed.items() if key.startswith(_MUST_STAY)]
    if refused:
        raise ConfigError(
            f"a run resumes with the settings it was started with, but {'; '.join(refused)}; "
            "restore them or start a new run"
        )
    return list(changed.values())


def _flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        name = prefix + key
        flat |= _flatten(value, f"{name}.") if isinstance(value, dict) else {name: value}
    return flat


def _find_commit() -> str | None:
    """Commit of the source this package was imported from; None outside a git checkout of it.

    `MEMORIZING_COMMIT` says it of a copy without its repository.
    """
    package = Path(__file__).resolve().parent
    commit = _run_git(["rev-parse", "HEAD"], package)
    # A package that is installed inside somebody's repository is not under its version control.
    if commit is None or not _run_git(["ls-files", Path(__file__).name], package):
        return os.environ.get("MEMORIZING_COMMIT")
    return f"{commit} with changes" if _run_git(["status", "--porcelain"], package) else commit


def _run_git(arguments: Sequence[str], folder: Path) -> str | None:
    try:
        done = subprocess.run(
            ["git", *arguments], cwd=folder, capture_output=True, text=True, timeout=10, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _find_processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next(
        (line.partition(":")[2].strip() for line in lines if line.startswith("model name")),
        platform.processor(),
    )
