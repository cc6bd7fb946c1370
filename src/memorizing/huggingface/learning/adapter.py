"""What was learned for a memory, saved by itself and loaded onto the base model.

adapter/
├── memory_settings.json        how the memory is read, and of which base model
├── memory_heads.safetensors    gates and scales
├── adapter_config.json         with LoRA: peft's own files, which peft loads without us
└── adapter_model.safetensors
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor, nn

from memorizing.errors import CheckpointError, ConfigError, IndexUnavailableError
from memorizing.huggingface.attaching.attachment import (
    Attachment,
    add_memory,
    get_attachment,
    unwrap,
)
from memorizing.huggingface.attaching.families import find_decoder
from memorizing.huggingface.attaching.memory_settings import MemorySettings
from memorizing.storage.files import write_bytes, write_json

SETTINGS_FILE = "memory_settings.json"
HEADS_FILE = "memory_heads.safetensors"
LORA_CONFIG_FILE = "adapter_config.json"
LORA_FILE = "adapter_model.safetensors"
FORMAT_VERSION = 1
_ADAPTER = "default"
_PREFIX = "base_model.model."
"""Of peft's names in its files."""
_MAY_DIFFER = ("capacity", "dtype", "index")
"""Settings that may be others than those of the training."""


def save_adapter(model: Any, folder: Path | str) -> None:
    """Save settings, gates and scales of a model's memory, and its LoRA where it has one.

    Args:
        model: with `add_memory`; as it is or inside of a `PeftModel`. Not changed.
        folder: made where it is missing; files of an earlier adapter there are replaced.

    Raises:
        ConfigError: the model has no memory, or peft layers that are not LoRA.
        ResourceError: the folder cannot be written.
    """
    inner = unwrap(model)
    attachment = get_attachment(inner)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    lora = find_lora(inner)
    for name in () if lora else (LORA_CONFIG_FILE, LORA_FILE):
        (folder / name).unlink(missing_ok=True)
    if lora is not None:
        import peft

        tensors = peft.get_peft_model_state_dict(
            inner, adapter_name=lora, save_embedding_layers=False
        )
        named = {_PREFIX + name.removeprefix(_PREFIX): t for name, t in tensors.items()}
        write_bytes(folder / LORA_FILE, _pack(named))
        config, was_inference = inner.peft_config[lora], inner.peft_config[lora].inference_mode
        config.inference_mode = True
        config.save_pretrained(str(folder))
        config.inference_mode = was_inference
    write_bytes(folder / HEADS_FILE, _pack(list_heads(attachment)))
    values = {
        "format_version": FORMAT_VERSION,
        "memory": attachment.settings.to_dict(),
        "base": _describe_base(inner),
    }
    write_json(folder / SETTINGS_FILE, values)


def load_adapter(
    model: Any, folder: Path | str, *, is_trainable: bool = False, **settings: Any
) -> Any:
    """Load what `save_adapter` saved onto the base model. In place; returns the model.

    A model without memory gets one with the adapter's settings. LoRA is put into the model itself,
    as `model.add_adapter` does, which makes all else untrainable.

    Args:
        model: the base model, with or without a memory of the same kind.
        folder: of the adapter.
        is_trainable: leave LoRA's weights and the gates trainable, and nothing else.
        settings: other values of `capacity`, `dtype` or `index` than the adapter was trained with.

    Raises:
        CheckpointError: the folder is no adapter, is damaged, or is of another base model.
        ConfigError: the model's memory is of another kind, or it has LoRA already; or other
            settings than those that may differ.
        StateError: a memory is open.
        IndexUnavailableError: it has LoRA, and peft is not installed.
    """
    inner, folder = unwrap(model), Path(folder)
    saved = read_adapter_settings(folder)
    unknown = sorted(settings.keys() - set(_MAY_DIFFER))
    if unknown:
        raise ConfigError(
            f"load_adapter got {', '.join(unknown)}; an adapter is read as it was trained, but for "
            f"{', '.join(_MAY_DIFFER)}"
        )
    wanted = replace(saved, **settings)
    _check_base(inner, folder)
    heads = _read_tensors(folder / HEADS_FILE)
    has_lora = (folder / LORA_CONFIG_FILE).is_file()
    if has_lora:
        require_peft()
        if find_lora(inner) is not None:
            raise ConfigError(
                "this model has LoRA already; load the adapter onto the base model, or merge it"
            )
    is_new = "memorizing" not in inner.__dict__
    if is_new:
        add_memory(inner, **wanted.to_dict())
    attachment = get_attachment(inner)
    try:
        attachment.check_unbound()
        _check_settings(attachment.settings, wanted)
        load_heads(attachment, heads, str(folder))
    except Exception:
        if is_new:
            attachment.remove()
        raise
    if has_lora:
        _load_lora(inner, folder, is_trainable=is_trainable)
    if is_trainable or has_lora:
        train_only(inner, memory=is_trainable, lora=is_trainable)
    return model


def read_adapter_settings(folder: Path) -> MemorySettings:
    """The settings of a saved adapter.

    Raises:
        CheckpointError: the folder is no adapter, or of another version.
    """
    values = _read_json(folder)
    if values.get("format_version") != FORMAT_VERSION:
        raise CheckpointError(
            f"{folder} has format version {values.get('format_version')!r}; this release reads "
            f"version {FORMAT_VERSION}"
        )
    try:
        return MemorySettings.from_dict(dict(values["memory"]))
    except (KeyError, TypeError, ConfigError) as error:
        raise CheckpointError(
            f"{folder / SETTINGS_FILE} does not describe a memory ({error}); it was altered: save "
            "the adapter again"
        ) from error


def add_lora(
    model: Any,
    *,
    rank: int,
    alpha: float,
    dropout: float = 0.0,
    first_layer: int = 0,
) -> None:
    """Put LoRA on the attention and MLP projections of a model of `transformers`. In place.

    Its weights are fp32 whatever the model's are, and nothing else is trainable afterwards. The
    product of its two factors starts at 0: the model computes as before.

    Args:
        model: in which no LoRA is.
        rank: of each update.
        alpha: the update is multiplied by alpha / rank.
        dropout: on what the update reads.
        first_layer: layers below get none.

    Raises:
        ConfigError: it has LoRA already.
        IndexUnavailableError: peft is not installed.
    """
    require_peft()
    import peft
    from transformers.pytorch_utils import Conv1D

    inner = unwrap(model)
    if find_lora(inner) is not None:
        raise ConfigError("this model has LoRA already; train that one, or begin with the base")
    decoder = find_decoder(inner)
    layers = getattr(decoder.base, decoder.family.layers)
    kinds = {
        name.rpartition(".")[2]: type(module)
        for layer in layers
        for name, module in layer.named_modules()
        if isinstance(module, (nn.Linear, Conv1D))
    }
    config = peft.LoraConfig(
        task_type="CAUSAL_LM",
        r=rank,
        lora_alpha=alpha,  # type: ignore[arg-type]
        lora_dropout=dropout,
        target_modules=sorted(kinds),
        layers_to_transform=list(range(first_layer, len(layers))) if first_layer else None,
        layers_pattern=decoder.family.layers if first_layer else None,
        fan_in_fan_out=any(issubclass(kind, Conv1D) for kind in kinds.values()),
    )
    inner.add_adapter(config, _ADAPTER)
    for name, parameter in inner.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.float()


def find_lora(inner: Any) -> str | None:
    """The name of the LoRA that a model of `transformers` has, or None.

    Raises:
        ConfigError: more than one, or another kind of peft's layers.
    """
    configs = getattr(inner, "peft_config", None) or {}
    kinds = [
        str(getattr(config.peft_type, "value", config.peft_type)) for config in configs.values()
    ]
    if not kinds:
        return None
    if kinds != ["LORA"]:
        raise ConfigError(
            f"the model has peft layers {', '.join(kinds)}; one LoRA can be saved with a memory: "
            "delete or merge the others"
        )
    return next(iter(configs))


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


def list_heads(attachment: Attachment) -> dict[str, Tensor]:
    """Gates, scales and norms of all memory layers by name."""
    return {
        f"layers.{number}.{name}": tensor.detach()
        for number, layer in attachment.layers.items()
        for name, tensor in layer.state_dict().items()
    }


def load_heads(attachment: Attachment, tensors: dict[str, Tensor], where: str) -> None:
    """Take over what `list_heads` gave. In place.

    Raises:
        CheckpointError: of other layers or numbers of heads.
    """
    mine = list_heads(attachment)
    for name in sorted(mine.keys() | tensors.keys()):
        seen = tuple(tensors[name].shape) if name in tensors else None
        expected = tuple(mine[name].shape) if name in mine else None
        if seen != expected:
            raise CheckpointError(
                f"{where} is of another model or other memory layers: its {name} is "
                f"{seen or 'missing'}, expected {expected or 'none'}"
            )
    with torch.no_grad():
        for name, tensor in mine.items():
            tensor.copy_(tensors[name])


def load_lora_weights(inner: Any, tensors: dict[str, Tensor], where: str) -> None:
    """Take over the weights that a file of peft holds. In place.

    Raises:
        CheckpointError: they are of another model.
    """
    import peft

    named = {name.removeprefix(_PREFIX): tensor for name, tensor in tensors.items()}
    lora = find_lora(inner)
    assert lora is not None
    mine = peft.get_peft_model_state_dict(inner, adapter_name=lora, save_embedding_layers=False)
    if {n: t.shape for n, t in mine.items()} != {n: t.shape for n, t in named.items()}:
        raise CheckpointError(
            f"{where} has LoRA of another model; load it onto the model it was trained on"
        )
    peft.set_peft_model_state_dict(inner, named, adapter_name=lora)


def require_peft() -> None:
    """Find out before the work whether peft is there.

    Raises:
        IndexUnavailableError: it is not installed.
    """
    try:
        import peft  # noqa: F401
    except ImportError as error:
        raise IndexUnavailableError(
            'LoRA needs peft, which is not installed; pip install "memorizing[peft]"'
        ) from error


def _load_lora(inner: Any, folder: Path, *, is_trainable: bool) -> None:
    import peft

    tensors = _read_tensors(folder / LORA_FILE)
    config = peft.PeftConfig.from_pretrained(str(folder))
    config.inference_mode = not is_trainable
    inner.add_adapter(config, _ADAPTER)
    for name, parameter in inner.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.float()
    load_lora_weights(inner, tensors, str(folder))


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


def _describe_base(inner: Any) -> dict[str, Any]:
    config = inner.config
    return {
        "model_type": str(config.model_type),
        "num_layers": int(config.num_hidden_layers),
        "hidden_size": int(config.hidden_size),
        "name": str(getattr(config, "_name_or_path", "") or ""),
    }


def _check_base(inner: Any, folder: Path) -> None:
    base = _read_json(folder).get("base")
    mine = _describe_base(inner)
    if not isinstance(base, dict):
        raise CheckpointError(f"{folder / SETTINGS_FILE} does not name its base; it was altered")
    for key in ("model_type", "num_layers", "hidden_size"):
        if base.get(key) != mine[key]:
            raise CheckpointError(
                f"{folder} was trained on a model with {key} = {base.get(key)!r} "
                f"({base.get('name') or 'without a name'}), and this one has {mine[key]!r}; load "
                "it onto its own base model"
            )


def _read_json(folder: Path) -> dict[str, Any]:
    path = folder / SETTINGS_FILE
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(
            f"{folder} is no adapter: it has no {SETTINGS_FILE}; give a folder that save_adapter "
            "or `memorizing finetune` wrote"
        ) from error
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read ({error}); save the adapter again") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{path} does not hold a JSON object; save the adapter again")
    return values


def _read_tensors(path: Path) -> dict[str, Tensor]:
    try:
        return load(path.read_bytes())
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"{path} cannot be read ({error}); copy the whole adapter again"
        ) from error


def _pack(tensors: dict[str, Tensor]) -> bytes:
    whole = {name: t.detach().cpu().contiguous().clone() for name, t in tensors.items()}
    return save(whole, metadata={"format": "pt"})
