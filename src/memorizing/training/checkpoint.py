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
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from memorizing.config import ModelConfig
from memorizing.data import Tokenizer, load_tokenizer
from memorizing.errors import CheckpointError, ConfigError, TokenizerError
from memorizing.model import MemorizingTransformer
from memorizing.settings import build_dataclass
from memorizing.training.checkpoints import CONFIG_FILE, TRAINER_FILE, find_checkpoint
from memorizing.training.folder import MANIFEST, read_json, verify_folder, write_folder

MODEL_FILE = "model.safetensors"
TOKENIZER_FILE = "tokenizer.json"
OPTIMIZER_FILE = "optimizer.safetensors"
STATE_FILE = "state.safetensors"
_MODEL_FILES = (CONFIG_FILE, MODEL_FILE)
_MODEL_TYPE = "memorizing_transformer"
_MODEL_TYPES = (_MODEL_TYPE, "memorizing")
"""The second is that of checkpoints before `transformers` could read them."""
_TRAINING_FILES = (TRAINER_FILE, OPTIMIZER_FILE, STATE_FILE)
GATE_SUFFIX = ".gate_bias"
_SLACK_BYTES = 1 << 20


class LoadedModel(NamedTuple):
    """A model with what it needs to read text."""

    model: MemorizingTransformer
    config: ModelConfig
    tokenizer: Tokenizer | None
    """None where the model was trained on token ids without one."""


@dataclasses.dataclass(frozen=True)
class TrainingState:
    """Everything of a run besides weights."""

    optimizer: dict[str, Tensor]
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
    config = {
        "model_type": _MODEL_TYPE,
        "architectures": ["MemorizingTransformerForCausalLM"],
        "tokenizer_fingerprint": tokenizer.fingerprint if tokenizer else None,
        "bos_token_id": tokenizer.start_token if tokenizer else None,
        **dataclasses.asdict(model.config),
    }

    def write(partial: Path) -> None:
        (partial / CONFIG_FILE).write_text(json.dumps(config, indent=2), encoding="utf-8")
        _save_tensors(model.state_dict(), partial / MODEL_FILE)
        if tokenizer:
            tokenizer.save(partial)
        if training:
            (partial / TRAINER_FILE).write_text(json.dumps(training.trainer), encoding="utf-8")
            _save_tensors(training.optimizer, partial / OPTIMIZER_FILE)
            _save_tensors(training.state, partial / STATE_FILE)

    tensors = [*model.state_dict().values()]
    if training:
        tensors += [*training.optimizer.values(), *training.state.values()]
    write_folder(folder, write, sum(t.numel() * t.element_size() for t in tensors) + _SLACK_BYTES)


def load_model(
    path: Path | str,
    *,
    device: torch.device | str | None = None,
    which: Literal["last", "best"] = "last",
) -> LoadedModel:
    """Load a model to use it: from a model folder, a checkpoint, or a run.

    Args:
        path: a folder that `save_model`, training or `save_pretrained` wrote.
        device: where to put the weights; None is the CPU.
        which: of a run, the last checkpoint, or the best by validation.

    Raises:
        CheckpointError: there is none, or it is truncated, altered, of another model, or its
            tokenizer was changed.
    """
    folder = find_checkpoint(Path(path), which)
    config, tokenizer = _read_description(folder)
    # Without its random start: the weights are about to be replaced, and the caller's generator
    # stays untouched.
    with torch.device("meta"):
        model = MemorizingTransformer(config)
    model.to_empty(device=device or "cpu")
    load_weights(folder, model)
    return LoadedModel(model.eval(), config, tokenizer)


def load_weights(
    folder: Path,
    model: MemorizingTransformer,
    tokenizer: Tokenizer | None = None,
    *,
    may_lack_memory: bool = False,
) -> None:
    """Copy the weights of a checkpoint into a model of the same configuration, in place.

    Args:
        folder: the checkpoint.
        model: gets the weights.
        tokenizer: of the run that loads them; None is not compared.
        may_lack_memory: what only a memory layer has (gates) keeps its start where the checkpoint
            has none: it is of a model without memory, or that combines in another way.

    Raises:
        CheckpointError: truncated, altered, or of another model or tokenizer.
    """
    verify_folder(folder, _MODEL_FILES, may_lack_manifest=True)
    fingerprint = read_json(folder / CONFIG_FILE).get("tokenizer_fingerprint")
    if tokenizer is not None and tokenizer.fingerprint != fingerprint:
        raise CheckpointError(
            f"{folder} was trained with another tokenizer than this run's; restore the "
            f"{TOKENIZER_FILE} of the run, or start a new one"
        )
    try:
        tensors = load_file(folder / MODEL_FILE)
    except SafetensorError as error:
        raise CheckpointError(
            f"{folder / MODEL_FILE} cannot be read ({error}); it is truncated or altered: use "
            "another checkpoint"
        ) from error
    own = model.state_dict()
    if may_lack_memory:
        gates = {name for name in own.keys() | tensors.keys() if name.endswith(GATE_SUFFIX)}
        tensors = {name: t for name, t in tensors.items() if name in own or name not in gates}
        tensors |= {name: own[name] for name in gates & own.keys() if name not in tensors}
    for name in own.keys() | tensors.keys():
        mine = tuple(own[name].shape) if name in own else None
        theirs = tuple(tensors[name].shape) if name in tensors else None
        if mine != theirs:
            raise CheckpointError(
                f"{folder} is of another model: its {name} is {theirs or 'missing'}, expected "
                f"{mine or 'none'}; use the configuration in its {CONFIG_FILE}"
            )
    model.load_state_dict(tensors)


def load_training_state(folder: Path) -> TrainingState:
    """Read what `save_model` wrote about training.

    Raises:
        CheckpointError: it is a model without training state, or a file is truncated or altered.
    """
    verify_folder(folder, _TRAINING_FILES)
    return TrainingState(
        load_file(folder / OPTIMIZER_FILE),
        load_file(folder / STATE_FILE),
        read_json(folder / TRAINER_FILE),
    )


def _read_description(folder: Path) -> tuple[ModelConfig, Tokenizer | None]:
    verify_folder(folder, (CONFIG_FILE,), may_lack_manifest=True)
    values = read_json(folder / CONFIG_FILE)
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
    return config, _load_checked_tokenizer(folder, values.get("tokenizer_fingerprint"))


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


def _save_tensors(tensors: Mapping[str, Tensor], path: Path) -> None:
    # safetensors refuses views that are not contiguous, and names that share memory.
    seen: set[int] = set()
    whole: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        tensor = tensor.detach().cpu().contiguous()
        if tensor.data_ptr() in seen:
            tensor = tensor.clone()
        seen.add(tensor.data_ptr())
        whole[name] = tensor
    save_file(whole, path, metadata={"format": "pt"})
