"""Checkpoints: a Hugging Face model folder with what training needs to go on beside it.

Safetensors and JSON only, no pickle. `transformers` reads it once `memorizing.huggingface` was
imported, and what it saves can be loaded here.

    step-000123/
    ├── config.json             the model's configuration and the tokenizer's fingerprint
    ├── model.safetensors       weights
    ├── tokenizer.json
    ├── manifest.json           sizes and SHA-256 of all files; `save_pretrained` writes none
    ├── trainer.json            training only: step, loader, scores, numbers of the optimizer
    ├── optimizer.safetensors   training only: moments
    └── state.safetensors       training only: caches and memories by row, RNG states
"""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from memorizing.config import ModelConfig
from memorizing.data import Tokenizer, load_tokenizer
from memorizing.errors import CheckpointError, ConfigError, MemorizingError, TokenizerError
from memorizing.model import MemorizingTransformer
from memorizing.model.block import is_of_memory
from memorizing.ranks import Shards
from memorizing.settings import build_dataclass
from memorizing.storage.files import name_temporary, read_json, remove_leftovers, write_json
from memorizing.storage.folders import MANIFEST, verify_folder, write_folder
from memorizing.storage.tensors import (
    MaybeAwaited,
    check_shapes,
    count_bytes,
    read_header,
    read_tensors,
    write_tensors,
)

CHECKPOINT_FOLDER = "checkpoints"
CONFIG_FILE = "config.json"
TRAINER_FILE = "trainer.json"
MODEL_FILE = "model.safetensors"
TOKENIZER_FILE = "tokenizer.json"
OPTIMIZER_FILE = "optimizer.safetensors"
STATE_FILE = "state.safetensors"
_MODEL_FILES = (CONFIG_FILE, MODEL_FILE)
_MODEL_TYPE = "memorizing_transformer"
_MODEL_TYPES = (_MODEL_TYPE, "memorizing")
"""The second is that of checkpoints before `transformers` could read them."""
_TRAINING_FILES = (TRAINER_FILE, OPTIMIZER_FILE, STATE_FILE)
_SLACK_BYTES = 1 << 22
_OTHER_MODEL = (
    f"use the configuration in its {CONFIG_FILE}, and the make_model that it was trained with"
)
_STEP_NAME = re.compile(r"step-([0-9]+)")


class LoadedModel(NamedTuple):
    """A model with what it needs to read text."""

    model: MemorizingTransformer
    config: ModelConfig
    tokenizer: Tokenizer | None
    """None where the model was trained on token ids without one."""


@dataclasses.dataclass(frozen=True)
class TrainingState:
    """Everything of a run besides weights."""

    optimizer: MaybeAwaited
    state: dict[str, Tensor]
    """Caches and memories as `row.<global row>.<name>`, RNG states as `rng.<name>`."""
    trainer: dict[str, Any]
    """Plain values for JSON."""


def save_model(
    folder: Path,
    model: MemorizingTransformer,
    tokenizer: Tokenizer | None,
    training: TrainingState | None = None,
) -> None:
    """Write a model folder, whole or not at all (`write_folder`).

    Args:
        folder: replaced where it exists.
        model: its weights and configuration.
        tokenizer: saved beside it; its fingerprint goes into the configuration.
        training: what makes the folder a training checkpoint.

    Raises:
        ResourceError: no space left; nothing is left behind.
    """
    tensors = model.state_dict()
    write_checkpoint(
        folder,
        lambda partial: write_model(partial, model, tensors, tokenizer),
        count_bytes(tensors),
        training,
    )


def write_model(
    folder: Path, model: MemorizingTransformer, tensors: MaybeAwaited, tokenizer: Tokenizer | None
) -> None:
    """Write a model's files into a folder that is there; `tensors` are its `state_dict`."""
    config = {
        "model_type": _MODEL_TYPE,
        "architectures": ["MemorizingTransformerForCausalLM"],
        "tokenizer_fingerprint": tokenizer.fingerprint if tokenizer else None,
        "bos_token_id": tokenizer.start_token if tokenizer else None,
        **dataclasses.asdict(model.config),
    }
    write_json(folder / CONFIG_FILE, config)
    write_tensors(folder / MODEL_FILE, tensors)
    if tokenizer:
        tokenizer.save(folder)


def write_checkpoint(
    folder: Path,
    write: Callable[[Path], None],
    num_bytes: int,
    training: TrainingState | None = None,
) -> None:
    """Write a model folder of any kind of model, whole or not at all (`write_folder`).

    Args:
        folder: replaced where it exists.
        write: writes the model into the folder that it is given.
        num_bytes: about how much that is.
        training: what makes the folder a training checkpoint.

    Raises:
        ResourceError: no space left; nothing is left behind.
    """

    def write_all(partial: Path) -> None:
        write(partial)
        if training:
            write_json(partial / TRAINER_FILE, training.trainer)
            write_tensors(partial / OPTIMIZER_FILE, training.optimizer)
            write_tensors(partial / STATE_FILE, training.state)

    if training:
        num_bytes += count_bytes(training.optimizer) + count_bytes(training.state)
    write_folder(folder, write_all, num_bytes + _SLACK_BYTES)


def load_model(
    path: Path | str,
    *,
    device: torch.device | str | None = None,
    which: Literal["last", "best"] = "last",
    make_model: Callable[[ModelConfig], MemorizingTransformer] = MemorizingTransformer,
) -> LoadedModel:
    """Load a model to use it: from a model folder, a checkpoint, or a run.

    Args:
        path: a folder that `save_model`, training or `save_pretrained` wrote.
        device: where to put the weights; None is the CPU.
        which: of a run, the last checkpoint, or the best by validation.
        make_model: what the model was made with, where `train` was given it. All that its weights
            do not hold, buffers included, has to be made without them.

    Raises:
        CheckpointError: there is none, or it is truncated, altered, of another model, or its
            tokenizer was changed.
    """
    folder = find_checkpoint(Path(path), which)
    config, tokenizer = _read_description(folder)
    remedy = advise(folder)
    verify_folder(folder, (MODEL_FILE,), may_lack_manifest=True, remedy=remedy)
    places = read_header(folder / MODEL_FILE, CheckpointError, remedy).places
    # Before any layer is made.
    found = {int(match[1]) for name in places if (match := re.match(r"blocks\.(\d{1,9})\.", name))}
    if len(found) != config.num_layers:
        raise CheckpointError(
            f"{folder} is of another model: its {CONFIG_FILE} says {config.num_layers} layers, and "
            f"its weights have {len(found)}; {remedy}"
        )
    # Without its random start: the weights are about to be replaced, and the caller's generator
    # stays untouched. Nothing is allocated before the file is known to hold these shapes.
    with torch.device("meta"), explain_damage(folder):
        model = make_model(config)
    check_shapes(str(folder), places, model.state_dict(), CheckpointError, _OTHER_MODEL)
    model.to_empty(device=device or "cpu")
    model.load_state_dict(read_tensors(folder / MODEL_FILE, CheckpointError, remedy))
    return LoadedModel(model.eval(), config, tokenizer)


def load_weights(
    folder: Path,
    model: MemorizingTransformer,
    tokenizer: Tokenizer | None = None,
    *,
    may_lack_memory: bool = False,
    shards: Shards | None = None,
) -> None:
    """Copy the weights of a checkpoint into a model of the same configuration, in place.

    Args:
        folder: the checkpoint.
        model: gets the weights.
        tokenizer: of the run that loads them; None is not compared.
        may_lack_memory: what only a memory layer has keeps its start where the checkpoint has none:
            it is of a model without memory, or that combines in another way.
        shards: of the model, where it is in parts.

    Raises:
        CheckpointError: truncated, altered, or of another model or tokenizer.
    """
    remedy = advise(folder)
    verify_folder(folder, _MODEL_FILES, may_lack_manifest=True, remedy=remedy)
    values = read_json(folder / CONFIG_FILE, CheckpointError, remedy)
    fingerprint = values.get("tokenizer_fingerprint")
    if tokenizer is not None and tokenizer.fingerprint != fingerprint:
        raise CheckpointError(
            f"{folder} was trained with another tokenizer than this run's; restore the "
            f"{TOKENIZER_FILE} of the run, of which each checkpoint has a copy, or start a new one"
        )
    own = model.state_dict()
    theirs = read_tensors(folder / MODEL_FILE, CheckpointError, remedy)
    if may_lack_memory:
        only = {name for name in own.keys() ^ theirs.keys() if is_of_memory(name)}
        theirs = {name: t for name, t in theirs.items() if name not in only}
        theirs |= {name: own[name] for name in only & own.keys()}
    check_shapes(str(folder), theirs, own, CheckpointError, _OTHER_MODEL)
    if shards is None:
        model.load_state_dict(theirs)
    else:
        shards.load(model, theirs)


def load_training_state(folder: Path) -> TrainingState:
    """Read what `save_model` wrote about training.

    Raises:
        CheckpointError: it is a model without training state, or a file is truncated or altered.
    """
    remedy = advise(folder)
    verify_folder(folder, _TRAINING_FILES, remedy=remedy)
    return TrainingState(
        read_tensors(folder / OPTIMIZER_FILE, CheckpointError, remedy),
        read_tensors(folder / STATE_FILE, CheckpointError, remedy),
        read_trainer(folder),
    )


def read_trainer(folder: Path) -> dict[str, Any]:
    """The plain values of a training checkpoint.

    Raises:
        CheckpointError: there are none, or they are truncated or altered.
    """
    verify_folder(folder, (TRAINER_FILE,), remedy=advise(folder))
    return read_json(folder / TRAINER_FILE, CheckpointError, advise(folder))


def _read_description(folder: Path) -> tuple[ModelConfig, Tokenizer | None]:
    remedy = advise(folder)
    verify_folder(folder, (CONFIG_FILE,), may_lack_manifest=True, remedy=remedy)
    values = read_json(folder / CONFIG_FILE, CheckpointError, remedy)
    if values.get("model_type") not in _MODEL_TYPES:
        raise CheckpointError(
            f"{folder} holds a model of type {values.get('model_type')!r}; expected "
            f"{_MODEL_TYPE!r}: give a folder that training wrote"
        )
    known = {field.name for field in dataclasses.fields(ModelConfig)}
    try:
        config = build_dataclass(
            ModelConfig, {k: v for k, v in values.items() if k in known}, "model."
        )
    except ConfigError as error:
        raise CheckpointError(
            f"{folder / CONFIG_FILE} does not describe a model: {error}"
        ) from error
    tokenizer = _load_checked_tokenizer(folder, values.get("tokenizer_fingerprint"))
    if tokenizer is not None and tokenizer.vocab_size > config.vocab_size:
        raise CheckpointError(
            f"the tokenizer of {folder} has ids up to {tokenizer.vocab_size - 1:,} and its model "
            f"only {config.vocab_size:,}; it was altered: {remedy}"
        )
    return config, tokenizer


def _load_checked_tokenizer(folder: Path, fingerprint: str | None) -> Tokenizer | None:
    if fingerprint is None:
        return None
    if not any((folder / name).exists() for name in (TOKENIZER_FILE, MANIFEST)):
        return None  # `save_pretrained` of a model, without its tokenizer
    try:
        tokenizer = load_tokenizer(folder)
    except TokenizerError as error:
        raise CheckpointError(
            f"the tokenizer of {folder} is missing or unreadable: {error}"
        ) from error
    if tokenizer.fingerprint != fingerprint:
        raise CheckpointError(
            f"the tokenizer of {folder} was changed: {TOKENIZER_FILE} is not the one the model was "
            "trained with; restore the file that training wrote"
        )
    return tokenizer


def locate_checkpoint(run_dir: Path, step: int) -> Path:
    """Where the checkpoint after a step is, or would be."""
    return run_dir / CHECKPOINT_FOLDER / f"step-{step:06d}"


def read_step(checkpoint: Path) -> int:
    """The step in a checkpoint's name; -1 where it has another name."""
    match = _STEP_NAME.fullmatch(checkpoint.name)
    return int(match[1]) if match else -1


def find_checkpoint(path: Path, which: Literal["last", "best"] = "last") -> Path:
    """The model folder that a path stands for: itself, or a checkpoint of the run it is.

    Raises:
        CheckpointError: there is no checkpoint, or the last one is damaged.
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
    with explain_damage(last):
        best = read_trainer(last)["validation"]["best_step"]
        if best is not None and not (found := locate_checkpoint(path, best)).is_dir():
            raise KeyError(found.name)
    if best is None:
        raise CheckpointError(
            f"{path} has no best checkpoint, because it never evaluated; use the last one"
        )
    return locate_checkpoint(path, best)


def list_checkpoints(run_dir: Path) -> list[Path]:
    """The checkpoints of a run, oldest first; those that were never finished are not among them."""
    found = [
        path
        for path in (run_dir / CHECKPOINT_FOLDER).glob("step-*")
        if read_step(path) >= 0 and path.is_dir()
    ]
    return sorted(found, key=read_step)


def find_whole_checkpoint(checkpoints: Sequence[Path], say: Callable[[str], None]) -> Path | None:
    """The last checkpoint of a run of which no file is damaged; None where there is none at all.

    Args:
        checkpoints: oldest first.
        say: told of those that are left out.

    Raises:
        CheckpointError: all are damaged; of the last one.
    """
    damages: list[CheckpointError] = []
    for checkpoint in reversed(checkpoints):
        try:
            verify_folder(checkpoint, remedy=advise(checkpoint))
        except CheckpointError as error:
            damages.append(error)
        else:
            for damage in damages:
                say(f"{damage}; it goes on from {checkpoint.name} now")
            return checkpoint
    if damages:
        raise damages[0]
    return None


def prune_checkpoints(run_dir: Path, num_kept: int, best_step: int | None, step: int) -> None:
    """Delete checkpoints up to a step but the latest `num_kept` and the best; and unfinished ones.

    What is later is damaged, or the run would have gone on from there, and nothing to rely on.
    """
    remove_leftovers(run_dir / CHECKPOINT_FOLDER, is_locked=True)
    found = [path for path in list_checkpoints(run_dir) if read_step(path) <= step]
    for path in found[:-num_kept]:
        if read_step(path) != best_step:
            # Under another name first: a kill must not leave a part of it under its own.
            with name_temporary(path.parent) as deleted:
                os.rename(path, deleted)


def advise(checkpoint: Path) -> str:
    """What to do about a checkpoint that is damaged."""
    if checkpoint.parent.name != CHECKPOINT_FOLDER or read_step(checkpoint) < 0:
        return "copy the whole folder again"
    others = [p for p in list_checkpoints(checkpoint.parent.parent) if p.name != checkpoint.name]
    if not others:
        return "it is the only checkpoint of its run: train again with --overwrite"
    return f"delete this checkpoint's folder, and the run goes on from {others[-1].name}"


@contextmanager
def explain_damage(checkpoint: Path) -> Iterator[None]:
    """Say of a checkpoint what values that cannot be used mean.

    Raises:
        CheckpointError: instead of what such values raise.
    """
    try:
        yield
    except MemorizingError:
        raise
    except (
        ArithmeticError,
        AttributeError,
        LookupError,
        RuntimeError,
        TypeError,
        ValueError,
    ) as error:
        raise CheckpointError(
            f"{checkpoint} does not hold what a run needs ({type(error).__name__}: {error}); it "
            f"was altered: {advise(checkpoint)}"
        ) from error
