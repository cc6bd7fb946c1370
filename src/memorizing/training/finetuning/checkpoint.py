"""Checkpoints of a finetuning: an adapter folder with what training needs to go on beside it.

step-000100/
├── memory_settings.json, memory_heads.safetensors, adapter_*   as `save_adapter` writes them
├── config.json, model.safetensors, ...    with train = "all": the whole model, in fp32
├── manifest.json           sizes and SHA-256 of all files
├── trainer.json            step, loader, scores, numbers of the optimizer
├── optimizer.safetensors   moments
└── state.safetensors       caches and memories by row, RNG states
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from memorizing.errors import CheckpointError
from memorizing.huggingface.attaching.attachment import Attachment
from memorizing.huggingface.learning.adapter import (
    HEADS_FILE,
    LORA_FILE,
    SETTINGS_FILE,
    find_lora,
    load_heads,
    load_lora_weights,
    save_adapter,
)
from memorizing.training.checkpoint import (
    MODEL_FILE,
    OPTIMIZER_FILE,
    STATE_FILE,
    TrainingState,
    load_training_state,
)
from memorizing.training.checkpoints import TRAINER_FILE
from memorizing.training.finetuning.weights import TrainedWeights
from memorizing.training.folder import verify_folder, write_folder

_SLACK_BYTES = 1 << 22


def write_checkpoint(
    folder: Path,
    inner: Any,
    weights: TrainedWeights,
    training: TrainingState,
    *,
    with_model: bool,
) -> None:
    """Write a checkpoint, whole or not at all (`write_folder`).

    Args:
        folder: replaced where it exists.
        inner: the model, with its memory.
        weights: what is trained of it, exact.
        training: what the next step depends on besides.
        with_model: save the whole model too.

    Raises:
        ResourceError: no space left; nothing is left behind.
    """

    def write(partial: Path) -> None:
        write_result(partial, inner, weights, with_model=with_model)
        (partial / TRAINER_FILE).write_text(json.dumps(training.trainer), encoding="utf-8")
        _save_tensors(training.optimizer, partial / OPTIMIZER_FILE)
        _save_tensors(training.state, partial / STATE_FILE)

    tensors = [*training.optimizer.values(), *training.state.values()]
    if with_model:
        tensors += list(inner.parameters())
    num_bytes = sum(tensor.numel() * max(4, tensor.element_size()) for tensor in tensors)
    write_folder(folder, write, num_bytes + _SLACK_BYTES)


def write_result(folder: Path, inner: Any, weights: TrainedWeights, *, with_model: bool) -> None:
    """Write what was learned: the adapter, and with `with_model` the whole model, in fp32."""
    if with_model:
        _save_model(folder, inner, weights)
    save_adapter(inner, folder)


def load_checkpoint(
    folder: Path, inner: Any, attachment: Attachment, weights: TrainedWeights, *, with_model: bool
) -> TrainingState:
    """Copy the weights of a checkpoint into a prepared model, in place; give the rest.

    Raises:
        CheckpointError: truncated, altered, or of another model.
    """
    lora = find_lora(inner)
    names = [SETTINGS_FILE, HEADS_FILE]
    names += [LORA_FILE] if lora else []
    names += [MODEL_FILE] if with_model else []
    verify_folder(folder, names)
    load_heads(attachment, _load_tensors(folder / HEADS_FILE), str(folder))
    if lora:
        load_lora_weights(inner, _load_tensors(folder / LORA_FILE), str(folder))
    if with_model:
        _load_model(folder, inner, weights)
    return load_training_state(folder)


def _save_model(folder: Path, inner: Any, weights: TrainedWeights) -> None:
    tensors = {
        name: weights.find_exact(tensor).detach()
        for name, tensor in inner.state_dict(keep_vars=True).items()
        if ".memory." not in name
    }
    inner.save_pretrained(folder, state_dict=tensors, max_shard_size="1TB")


def _load_model(folder: Path, inner: Any, weights: TrainedWeights) -> None:
    tensors = _load_tensors(folder / MODEL_FILE)
    mine = {
        name: tensor
        for name, tensor in inner.state_dict(keep_vars=True).items()
        if ".memory." not in name
    }
    done: set[int] = set()
    with torch.no_grad():
        for name, tensor in tensors.items():
            exact = weights.find_exact(mine[name]) if name in mine else None
            if exact is None or exact.shape != tensor.shape:
                raise CheckpointError(
                    f"{folder} is of another model: its {name} is {tuple(tensor.shape)}, expected "
                    f"{None if exact is None else tuple(exact.shape)}"
                )
            exact.copy_(tensor)
            done.add(id(mine[name]))
    # Tied weights are saved once.
    lacking = [name for name, tensor in mine.items() if id(tensor) not in done]
    if lacking:
        raise CheckpointError(f"{folder} lacks {lacking[0]}; it is of another model")
    weights.give_back()


def _save_tensors(tensors: Mapping[str, Tensor], path: Path) -> None:
    # safetensors refuses names that share memory.
    whole = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    save_file(whole, path, metadata={"format": "pt"})


def _load_tensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except SafetensorError as error:
        raise CheckpointError(
            f"{path} cannot be read ({error}); it is truncated or altered: use another checkpoint"
        ) from error
