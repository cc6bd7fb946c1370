"""The folder of a run, of either kind: what it holds describes itself, and one process writes it.

run/
├── config.toml        a training's settings (a finetuning's: `finetune.json`)
├── run.json           its sessions: versions, commit, command, machine
├── tokenizer.json     of a training
├── metrics.jsonl, tensorboard/, log.txt
├── checkpoints/       may be a link to a folder elsewhere
├── adapter/           of a finetuning that is done
└── lock               who writes here
"""

from __future__ import annotations

import contextlib
import functools
import os
import platform
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from memorizing import __version__
from memorizing.config import Config
from memorizing.errors import ConfigError, MemorizingError, RunFolderError
from memorizing.ranks import ALONE, Ranks
from memorizing.settings import flatten_tables
from memorizing.storage.files import (
    explain_failures,
    is_leftover,
    name_temporary,
    read_bytes,
    read_json,
    remove,
    remove_leftovers,
    write_json,
)
from memorizing.storage.locks import LOCK, hold_lock
from memorizing.training.checkpoint import (
    CHECKPOINT_FOLDER,
    find_whole_checkpoint,
    list_checkpoints,
)
from memorizing.training.precision import choose_precision
from memorizing.training.reporting import METRICS_FILE, TENSORBOARD_FOLDER

CONFIG_FILE = "config.toml"
RUN_FILE = "run.json"
LOG_FILE = "log.txt"
_OURS = (RUN_FILE, METRICS_FILE, LOG_FILE, TENSORBOARD_FOLDER)
"""What runs of both kinds write, besides checkpoints."""
_REPLACED = ".replaced"
"""Where the old run is while a new one takes its place."""
_PACKAGES = ("torch", "transformers", "tokenizers", "safetensors", "numpy")


@dataclass(frozen=True)
class RunKind:
    """What tells the runs of a verb."""

    name: str
    """In messages."""
    config_file: str
    """Holds the settings; a folder with it is a run of this kind."""
    others: tuple[str, ...]
    """What else no other kind writes."""
    must_stay: tuple[str, ...]
    """How the settings begin that a run resumes with; others may change, and the change is said."""


TRAINING = RunKind(
    "run",
    CONFIG_FILE,
    ("tokenizer.json",),
    (
        "model.",
        "tokenizer.",
        "data.",
        "training.rows",
        "training.accumulation",
        "training.optimizer",
        "training.precision",
        "training.seed",
        "training.start_from",
    ),
)


class RunFolder:
    """The folder of a run, while this process is the only one that writes it (`open_run`).

    Nothing in it changes before `begin`.
    """

    def __init__(
        self, path: Path, kind: RunKind, *, resume: bool, overwrite: bool, ranks: Ranks
    ) -> None:
        """Say what is wanted of a folder, by which processes."""
        if resume and overwrite:
            raise RunFolderError("resume and overwrite exclude each other; give one of them")
        self.path, self.kind, self._ranks = path, kind, ranks
        self.is_resumed, self._overwrite = resume, overwrite
        self.has_begun = False

    @property
    def checkpoints(self) -> list[Path]:
        """Those of the run that is resumed, oldest first."""
        return list_checkpoints(self.path) if self.is_resumed else []

    def find_checkpoint(self, say: Callable[[str], None]) -> Path | None:
        """The one to go on from: the last that is whole, as the main process finds; see there."""
        found = find_whole_checkpoint(self.checkpoints, say) if self._ranks.is_main else None
        name = self._ranks.share(found.name if found else None)
        return self.path / CHECKPOINT_FOLDER / name if name else None

    def check(self) -> bool:
        """Refuse a folder that is none for a run. Writes nothing; tells whether a run is there.

        Raises:
            RunFolderError: see `open_run`.
        """
        path, name = self.path, self.kind.name
        nearest = next(p for p in (path, *path.absolute().parents) if os.path.lexists(p))
        if not nearest.is_dir():
            raise RunFolderError(f"{nearest} is a file; give the run a folder")
        is_run = any((path / place / self.kind.config_file).is_file() for place in ("", _REPLACED))
        if self.is_resumed and not is_run:
            raise RunFolderError(
                f"{path} holds no {name} to resume (no {self.kind.config_file}); leave out "
                "--resume to start one"
            )
        if not is_run and path.is_dir():
            found = (
                one.name for one in path.iterdir() if not is_leftover(one.name, is_locked=True)
            )
            if set(found) - {LOCK, _REPLACED}:
                raise RunFolderError(
                    f"{path} exists and is not a {name}; give the run a new or empty folder"
                )
        kept = path / CHECKPOINT_FOLDER
        if os.path.lexists(kept) and not kept.is_dir():
            raise RunFolderError(
                f"{kept} is a file, or a link that leads nowhere; checkpoints need a folder there: "
                "remove it"
            )
        return is_run

    def begin(self, write: Callable[[Path], None], session: Mapping[str, Any]) -> None:
        """Write what describes the run; one that was there is replaced only now.

        A kill in between leaves the old run, which is put back when the folder is opened again, or
        the new one. What others put into the folder stays.

        Args:
            write: writes the settings, and what else the run needs from the start, into the folder
                that it is given.
            session: what is known of this session, besides the machine.

        Raises:
            ResourceError: the folder cannot be written; the old run is there as before.
        """
        path = self.path
        started = {"started": datetime.now(UTC).isoformat(timespec="seconds")}
        earlier = read_sessions(path) if self.is_resumed else []
        with explain_failures(path):
            try:
                if self._overwrite:
                    self._put_away()
                write(path)
                sessions = [*earlier, started | describe_machine() | dict(session)]
                write_json(path / RUN_FILE, {"sessions": sessions})
            except BaseException:
                self.restore()
                raise
            self.has_begun = True
            for folder in self._list_folders():
                if (folder / _REPLACED).is_dir():
                    with name_temporary(folder) as old:
                        # From here on the old run is gone.
                        os.rename(folder / _REPLACED, old)

    def _list_folders(self) -> tuple[Path, Path]:
        # Checkpoints are put away where they are: their folder may be a link to another disk.
        return self.path, self.path / CHECKPOINT_FOLDER

    def _put_away(self) -> None:
        names = [*_OURS, self.kind.config_file, *self.kind.others]
        checkpoints = [path.name for path in list_checkpoints(self.path)]
        for folder, ours in zip(self._list_folders(), (names, checkpoints), strict=True):
            present = [name for name in ours if os.path.lexists(folder / name)]
            if present:
                (folder / _REPLACED).mkdir()
            for name in present:
                os.rename(folder / name, folder / _REPLACED / name)

    def restore(self) -> None:
        """Put back a run whose replacement was stopped midway, and remove what is left of others.

        Raises:
            OSError: it cannot be done.
        """
        run, checkpoints = self._list_folders()
        is_midway = (run / _REPLACED).is_dir()
        for folder in (checkpoints, run):
            remove_leftovers(folder, is_locked=True)
            replaced = folder / _REPLACED
            if not replaced.is_dir():
                continue
            for path in replaced.iterdir() if is_midway else ():
                remove(folder / path.name)
                os.rename(path, folder / path.name)
            remove(replaced)


@contextlib.contextmanager
def open_run(
    run_dir: Path,
    kind: RunKind,
    *,
    resume: bool = False,
    overwrite: bool = False,
    ranks: Ranks = ALONE,
) -> Iterator[RunFolder]:
    """Be the only one who writes the folder of a run, for as long as the block lasts.

    Of several processes the main one is; the others wait until it has opened the folder, and read.

    Args:
        run_dir: the folder: missing, empty, or a run, with one of the two flags.
        kind: of the run.
        resume: the folder must hold such a run.
        overwrite: the folder may hold such a run, which is replaced at `begin`.
        ranks: the processes that work on the run.

    Raises:
        RunFolderError: the folder holds something and neither flag is given; it is not a run of
            this kind; there is no run to resume; or another process writes it, which is named.
        ResourceError: the folder cannot be made.
    """
    run = RunFolder(run_dir, kind, resume=resume, overwrite=overwrite, ranks=ranks)
    if not ranks.is_main:
        ranks.wait()
        yield run
        return
    run.check()
    made = [path for path in (run_dir, *run_dir.parents) if not path.exists()]
    try:
        with contextlib.ExitStack() as stack:
            with explain_failures(run_dir):
                run_dir.mkdir(parents=True, exist_ok=True)
                remedy = "wait until it is done, or stop it"
                stack.enter_context(hold_lock(run_dir, RunFolderError, remedy=remedy))
                if run.check() and not (resume or overwrite):
                    raise RunFolderError(
                        f"{run_dir} holds a run already; use --resume to continue it, --overwrite "
                        "to replace it, or another folder"
                    )
                run.restore()
            if resume:
                read_sessions(run_dir)
            ranks.wait()
            yield run
    finally:
        if made and not run.has_begun:
            with contextlib.suppress(OSError):
                (run_dir / LOCK).unlink()
                for path in made:
                    path.rmdir()


def read_run_config(run_dir: Path) -> Config:
    """The configuration of a training.

    Raises:
        RunFolderError: the folder is not a run, or its configuration cannot be read.
    """
    path = Path(run_dir) / CONFIG_FILE
    try:
        return Config.from_dict(tomllib.loads(read_bytes(path).decode()))
    except FileNotFoundError as error:
        raise RunFolderError(
            f"{run_dir} is not a run: it has no {CONFIG_FILE}; give the folder of a training run"
        ) from error
    except (OSError, ValueError, RecursionError, MemorizingError) as error:
        raise RunFolderError(
            f"{path} cannot be read ({error}); restore the file that training wrote"
        ) from error


def compare_settings(
    saved: Mapping[str, Any], wanted: Mapping[str, Any], must_stay: tuple[str, ...]
) -> list[str]:
    """Compare the settings of a run with those it is resumed with, as far as both have them.

    Args:
        saved: tables of the run.
        wanted: tables, as JSON holds them.
        must_stay: how the settings begin that may not change.

    Returns:
        A line for every setting that has another value.

    Raises:
        ConfigError: settings that may not change have; each is named.
    """
    old, new = flatten_tables(saved), flatten_tables(wanted)
    changed = {
        key: f"{key} was {old[key]!r} and is {new[key]!r}"
        for key in new
        if key in old and new[key] != old[key]
    }
    refused = [line for key, line in changed.items() if key.startswith(must_stay)]
    if refused:
        raise ConfigError(
            f"a run resumes with the settings it was started with, but {'; '.join(refused)}; "
            "restore them or start a new run"
        )
    return list(changed.values())


def record(run_dir: Path, values: Mapping[str, Any]) -> None:
    """Add values to the last session in `run.json`.

    Raises:
        RunFolderError: there is none, or the file is damaged.
    """
    sessions = read_sessions(run_dir)
    if not sessions:
        raise RunFolderError(f"{run_dir} has no session yet; train first")
    sessions[-1].update(values)
    write_json(run_dir / RUN_FILE, {"sessions": sessions})


def read_sessions(run_dir: Path) -> list[dict[str, Any]]:
    """The sessions of a run, oldest first; none where nothing is written yet.

    Raises:
        RunFolderError: the file is damaged.
    """
    path = run_dir / RUN_FILE
    if not os.path.lexists(path):
        return []
    remedy = "delete it to go on without its history"
    sessions = read_json(path, RunFolderError, remedy).get("sessions")
    if not isinstance(sessions, list) or not all(isinstance(one, dict) for one in sessions):
        raise RunFolderError(f"{path} does not hold sessions; it was altered: {remedy}")
    return sessions


def read_trained_dtype(run_dir: Path) -> torch.dtype:
    """Of the products in a run's last session; a recipe may have left the choice to the machine.

    Raises:
        RunFolderError: the file of the sessions is damaged.
    """
    return choose_precision(read_sessions(run_dir)[-1]["precision"], 0, 0).dtype


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


@functools.cache
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
