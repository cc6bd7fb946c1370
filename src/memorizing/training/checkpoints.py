"""The checkpoints of a run: where they are, which one is meant, which are kept."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Literal

from memorizing.errors import CheckpointError
from memorizing.training.folder import TEMPORARY, read_json, verify_folder

CHECKPOINT_FOLDER = "checkpoints"
CONFIG_FILE = "config.json"
TRAINER_FILE = "trainer.json"


def locate_checkpoint(run_dir: Path, step: int) -> Path:
    """Where the checkpoint after a step is, or would be."""
    return run_dir / CHECKPOINT_FOLDER / f"step-{step:06d}"


def read_step(checkpoint: Path) -> int:
    """The step in a checkpoint's name."""
    return int(checkpoint.name[5:])


def find_checkpoint(path: Path, which: Literal["last", "best"] = "last") -> Path:
    """The model folder that a path stands for: itself, or a checkpoint of the run it is.

    Raises:
        CheckpointError: there is no checkpoint.
    """
    if (path / CONFIG_FILE).is_file():
        return path
    checkpoints = list_checkpoints(path)
    if not checkpoints:
        raise CheckpointError(
            f"{path} holds no checkpoint; give a run that has saved one, or a model folder"
        )
    last = checkpoints[-1]
    if which == "last":
        return last
    verify_folder(last, (TRAINER_FILE,))
    best = read_json(last / TRAINER_FILE)["validation"]["best_step"]
    if best is None:
        raise CheckpointError(
            f"{path} has no best checkpoint, because it never evaluated; use the last one"
        )
    return locate_checkpoint(path, best)


def list_checkpoints(run_dir: Path) -> list[Path]:
    """The checkpoints of a run, oldest first; those that were never finished are not among them."""
    found = [
        p
        for p in (run_dir / CHECKPOINT_FOLDER).glob("step-*")
        if p.name[5:].isdigit() and p.is_dir()
    ]
    return sorted(found, key=read_step)


def prune_checkpoints(run_dir: Path, num_kept: int, best_step: int | None) -> None:
    """Delete all checkpoints but the latest `num_kept` and the best, and unfinished ones."""
    for path in (run_dir / CHECKPOINT_FOLDER).glob(f"{TEMPORARY}*"):
        shutil.rmtree(path)
    for path in list_checkpoints(run_dir)[:-num_kept]:
        if read_step(path) != best_step:
            shutil.rmtree(path)
