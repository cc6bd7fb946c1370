"""What was learned for a memory, saved by itself and loaded onto the base model.

adapter/
├── memory_settings.json        how the memory is read, and of which base model
├── memory_heads.safetensors    gates and scales
├── adapter_config.json         with LoRA: peft's own files, which peft loads without us
├── adapter_model.safetensors
└── manifest.json               sizes and SHA-256 of these files; older adapters have none
"""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import replace
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch
from torch import nn

from memorizing.errors import CheckpointError, ConfigError
from memorizing.huggingface.attaching.attachment import (
    Attachment,
    add_memory,
    describe_base,
    find_attachment,
    get_attachment,
    unwrap,
)
from memorizing.huggingface.attaching.memory_settings import MemorySettings
from memorizing.huggingface.learning.lora import (
    LORA_CONFIG_FILE,
    LORA_FILE,
    PREFIX,
    REMEDY,
    find_lora,
    list_lora,
    load_lora_weights,
    plan_lora,
    put_in,
    remove_lora,
    require_peft,
)
from memorizing.storage.files import read_json, write_json
from memorizing.storage.folders import MANIFEST, read_manifest, verify_folder, write_folder
from memorizing.storage.tensors import read_tensors, write_tensors

SETTINGS_FILE = "memory_settings.json"
HEADS_FILE = "memory_heads.safetensors"
_WEIGHTS = "model*.safetensors"
"""As `save_pretrained` names the weights of a whole model: where all of them were trained."""
_FILES = (SETTINGS_FILE, HEADS_FILE, LORA_CONFIG_FILE, LORA_FILE)
FORMAT_VERSION = 1
_MAY_DIFFER = ("capacity", "dtype", "index")
"""Settings that may be others than those of the training."""


def save_adapter(model: Any, folder: Path | str) -> None:
    """Save settings, gates and scales of a model's memory, and its LoRA where it has one.

    A kill at any moment leaves the old adapter or the new one.

    Args:
        model: with `add_memory`; as it is or inside of a `PeftModel`. Not changed.
        folder: made where it is missing; files of an earlier adapter there are replaced, others
            stay.

    Raises:
        ConfigError: the model has no memory, or peft layers that are not one LoRA.
        StateError: something copied or wrapped the memory's layers.
        ResourceError: the folder cannot be written.
    """
    inner = unwrap(model)
    get_attachment(inner).check_layers()
    # What is learned in the place of a prompt is kept by the `PeftModel`, not by the model inside.
    for config in (getattr(model, "peft_config", None) or {}).values():
        if getattr(config, "is_prompt_learning", False):
            raise ConfigError(
                f"the model has {config.peft_type.value} of peft; one LoRA can be saved with a "
                "memory: save the base model inside of it"
            )
    find_lora(inner)
    write_folder(Path(folder), lambda partial: write_adapter(inner, partial), ours=_FILES)


def write_adapter(inner: Any, folder: Path) -> None:
    """Write the files of an adapter into a folder that is being written; see `save_adapter`."""
    attachment, lora = get_attachment(inner), find_lora(inner)
    if lora is not None:
        write_tensors(
            folder / LORA_FILE, {PREFIX + name: t for name, t in list_lora(inner, lora).items()}
        )
        config = copy.copy(inner.peft_config[lora])
        config.inference_mode = True
        config.save_pretrained(str(folder))
    write_tensors(folder / HEADS_FILE, attachment.list_heads())
    values = {
        "format_version": FORMAT_VERSION,
        "memory": attachment.settings.to_dict(),
        "base": describe_base(inner),
    }
    write_json(folder / SETTINGS_FILE, values)


def load_adapter(
    model: Any, folder: Path | str, *, is_trainable: bool = False, **settings: Any
) -> Any:
    """Load what `save_adapter` saved onto the base model. In place; returns the model.

    A model without memory gets one with the adapter's settings. LoRA is put into the model itself,
    as `model.add_adapter` does, which makes all else untrainable. A folder that holds a whole model
    too goes onto that model, loaded by `from_pretrained`.

    Args:
        model: the base model, with or without a memory of the same kind.
        folder: of the adapter.
        is_trainable: leave LoRA's weights and the gates trainable, and nothing else.
        settings: other values of `capacity`, `dtype` or `index` than the adapter was trained with.

    Raises:
        CheckpointError: the folder is no adapter, is damaged, or is of another base model, or of
            other weights where it holds all of them.
        ConfigError: the model's memory is of another kind, or it has LoRA already; or other
            settings than those that may differ.
        StateError: a memory is open.
        IndexUnavailableError: it has LoRA, and peft is not installed, or too old.
    """
    inner, folder = unwrap(model), Path(folder)
    unknown = sorted(settings.keys() - set(_MAY_DIFFER))
    if unknown:
        raise ConfigError(
            f"load_adapter got {', '.join(unknown)}; an adapter is read as it was trained, but for "
            f"{', '.join(_MAY_DIFFER)}"
        )
    wanted = replace(read_adapter_settings(folder, inner), **settings)
    has_manifest = (folder / MANIFEST).is_file()
    known = read_manifest(folder, CheckpointError, REMEDY) if has_manifest else {}
    # One that lost a file of its LoRA is not one without LoRA.
    has_lora = any(name in known or os.path.lexists(folder / name) for name in _FILES[2:])
    names = _FILES if has_lora else (SETTINGS_FILE, HEADS_FILE)
    verify_folder(folder, names, may_lack_manifest=True, remedy=REMEDY)
    _check_weights(inner, folder, known)
    heads = read_tensors(folder / HEADS_FILE, CheckpointError, REMEDY)
    if has_lora:
        require_peft()
        if find_lora(inner) is not None:
            raise ConfigError(
                "this model has LoRA already; load the adapter onto the base model, or merge it"
            )
    flags = [(parameter, parameter.requires_grad) for parameter in inner.parameters()]
    with ExitStack() as undo:
        if find_attachment(inner) is None:
            add_memory(inner, **wanted.to_dict())
            undo.callback(get_attachment(inner).remove)
        attachment = get_attachment(inner)
        _check_settings(attachment.settings, wanted)
        if has_lora:
            tensors = read_tensors(folder / LORA_FILE, CheckpointError, REMEDY)
            config = plan_lora(inner, tensors, folder)
            config.inference_mode = not is_trainable
            undo.callback(remove_lora, inner, flags)
            put_in(inner, config)
            load_lora_weights(inner, tensors, str(folder))
        attachment.load_heads(heads, str(folder))
        undo.pop_all()
    if is_trainable or has_lora:
        train_only(inner, memory=is_trainable, lora=is_trainable)
    return model


def _check_weights(inner: Any, folder: Path, known: Mapping[str, Any]) -> None:
    """Refuse a model whose weights are not those of a folder that holds all of them.

    Raises:
        CheckpointError: with what to load instead.
    """
    names = {path.name for path in folder.glob(_WEIGHTS)}
    names |= {name for name in known if fnmatch(name, _WEIGHTS)}
    mine, compared, other = inner.state_dict(), 0, None
    for file in sorted(names):
        for name, tensor in read_tensors(folder / file, CheckpointError, REMEDY).items():
            own = mine.get(name)
            form = tensor.shape, tensor.is_floating_point()
            if own is None or own.is_meta or (own.shape, own.is_floating_point()) != form:
                continue  # the model has it in another form: quantized, padded, offloaded
            compared += 1
            if other is None and not torch.equal(tensor.to(own.device, own.dtype), own):
                other = name
    if names and (other or not compared):
        raise CheckpointError(
            f"{folder} holds all weights of a model, and this model has others"
            f"{f', such as {other}' if other else ''}; load the model from that folder: "
            f"from_pretrained({str(folder)!r}), `memorizing generate {folder} --adapter {folder}`"
        )


def read_adapter_settings(folder: Path, inner: Any = None) -> MemorySettings:
    """The settings of a saved adapter.

    Args:
        folder: of the adapter.
        inner: the model that it shall be loaded onto, where that is known.

    Raises:
        CheckpointError: the folder is no adapter, is damaged, of another version, or of another
            base model.
    """
    missing = (
        f"{folder} is no adapter: it has no {SETTINGS_FILE}; give a folder that save_adapter or "
        "`memorizing finetune` wrote"
    )
    values = read_json(folder / SETTINGS_FILE, CheckpointError, REMEDY, missing=missing)
    if values.get("format_version") != FORMAT_VERSION:
        raise CheckpointError(
            f"{folder} has format version {values.get('format_version')!r}; this release reads "
            f"version {FORMAT_VERSION}"
        )
    base = values.get("base")
    for key, mine in {} if inner is None else describe_base(inner).items():
        if not isinstance(base, dict):
            raise CheckpointError(
                f"{folder / SETTINGS_FILE} does not name its base; it was altered: {REMEDY}"
            )
        if key != "name" and base.get(key) != mine:
            raise CheckpointError(
                f"{folder} was trained on a model with {key} = {base.get(key)!r} "
                f"({base.get('name') or 'without a name'}), and this one has {mine!r}; load "
                "it onto its own base model"
            )
    try:
        return MemorySettings.from_dict(values.get("memory"))
    except ConfigError as error:
        raise CheckpointError(
            f"{folder / SETTINGS_FILE} does not describe a memory ({error}); it was altered: "
            f"{REMEDY}"
        ) from error


def train_only(inner: Any, *, memory: bool, lora: bool, others: bool = False) -> None:
    """Say which parameters are trained: gates and scales, LoRA, all others. In place."""
    heads = {id(parameter) for parameter in list_parameters(get_attachment(inner))}
    for name, parameter in inner.named_parameters():
        if id(parameter) in heads:
            parameter.requires_grad_(memory)
        else:
            parameter.requires_grad_(lora if "lora_" in name else others)


def list_parameters(attachment: Attachment) -> list[nn.Parameter]:
    """Gates and scales of all memory layers."""
    return [p for layer in attachment.layers.values() for p in layer.parameters()]


def _check_settings(mine: MemorySettings, wanted: MemorySettings) -> None:
    """Refuse a memory that reads in another way than the adapter was trained for."""
    given, needed = mine.to_dict(), wanted.to_dict()
    wrong = [
        f"{key} is {given[key]!r} and should be {value!r}"
        for key, value in needed.items()
        if key not in (*_MAY_DIFFER, "bias", "temperature") and given[key] != value
    ]
    if wrong:
        raise ConfigError(
            f"the model has a memory of another kind than the adapter: {'; '.join(wrong)}; call "
            "remove_memory(model) first"
        )
