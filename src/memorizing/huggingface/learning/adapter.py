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
import math
import os
import re
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import replace
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from memorizing.errors import CheckpointError, ConfigError, IndexUnavailableError
from memorizing.huggingface.attaching.attachment import (
    Attachment,
    add_memory,
    check_finite,
    describe_base,
    find_attachment,
    get_attachment,
    unwrap,
)
from memorizing.huggingface.attaching.families import find_layers
from memorizing.huggingface.attaching.memory_settings import MemorySettings
from memorizing.storage.files import read_json, write_json
from memorizing.storage.folders import MANIFEST, read_manifest, verify_folder, write_folder
from memorizing.storage.tensors import check_shapes, read_tensors, write_tensors

SETTINGS_FILE = "memory_settings.json"
HEADS_FILE = "memory_heads.safetensors"
LORA_CONFIG_FILE = "adapter_config.json"
LORA_FILE = "adapter_model.safetensors"
_WEIGHTS = "model*.safetensors"
"""As `save_pretrained` names the weights of a whole model: where all of them were trained."""
_FILES = (SETTINGS_FILE, HEADS_FILE, LORA_CONFIG_FILE, LORA_FILE)
FORMAT_VERSION = 1
_PREFIX = "base_model.model."
"""Of peft's names in its files."""
_MAY_DIFFER = ("capacity", "dtype", "index")
"""Settings that may be others than those of the training."""
_REMEDY = "save the adapter again, or copy the whole of it"


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
            folder / LORA_FILE, {_PREFIX + name: t for name, t in list_lora(inner, lora).items()}
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
    known = read_manifest(folder, CheckpointError, _REMEDY) if has_manifest else {}
    # One that lost a file of its LoRA is not one without LoRA.
    has_lora = any(name in known or os.path.lexists(folder / name) for name in _FILES[2:])
    names = _FILES if has_lora else (SETTINGS_FILE, HEADS_FILE)
    verify_folder(folder, names, may_lack_manifest=True, remedy=_REMEDY)
    _check_weights(inner, folder, known)
    heads = read_tensors(folder / HEADS_FILE, CheckpointError, _REMEDY)
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
            tensors = read_tensors(folder / LORA_FILE, CheckpointError, _REMEDY)
            config = _plan_lora(inner, tensors, folder)
            config.inference_mode = not is_trainable
            undo.callback(_remove_lora, inner, flags)
            _put_in(inner, config)
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
        for name, tensor in read_tensors(folder / file, CheckpointError, _REMEDY).items():
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
    values = read_json(folder / SETTINGS_FILE, CheckpointError, _REMEDY, missing=missing)
    if values.get("format_version") != FORMAT_VERSION:
        raise CheckpointError(
            f"{folder} has format version {values.get('format_version')!r}; this release reads "
            f"version {FORMAT_VERSION}"
        )
    base = values.get("base")
    for key, mine in {} if inner is None else describe_base(inner).items():
        if not isinstance(base, dict):
            raise CheckpointError(
                f"{folder / SETTINGS_FILE} does not name its base; it was altered: {_REMEDY}"
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
            f"{_REMEDY}"
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
        IndexUnavailableError: peft is not installed, or too old.
    """
    require_peft()
    import peft
    from transformers.pytorch_utils import Conv1D

    inner = unwrap(model)
    if find_lora(inner) is not None:
        raise ConfigError("this model has LoRA already; train that one, or begin with the base")
    _, family, layers = find_layers(inner)
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
        layers_pattern=family.layers if first_layer else None,
        fan_in_fan_out=any(issubclass(kind, Conv1D) for kind in kinds.values()),
    )
    _put_in(inner, config)


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


def list_lora(inner: Any, lora: str) -> dict[str, Tensor]:
    """The weights of a LoRA, and of the modules that are saved with it, by name."""
    import peft

    tensors = peft.get_peft_model_state_dict(inner, adapter_name=lora, save_embedding_layers=False)
    return {name.removeprefix(_PREFIX): tensor for name, tensor in tensors.items()}


def load_lora_weights(inner: Any, tensors: Mapping[str, Tensor], where: str) -> None:
    """Take over the weights that a file of peft holds. In place.

    Raises:
        CheckpointError: they are of another model, or not finite.
    """
    import peft

    named = {name.removeprefix(_PREFIX): tensor for name, tensor in tensors.items()}
    lora = find_lora(inner)
    assert lora is not None
    check_shapes(
        where, named, list_lora(inner, lora), CheckpointError, "load it onto the model it is of"
    )
    check_finite(named, where, CheckpointError)
    peft.set_peft_model_state_dict(inner, named, adapter_name=lora)


def require_peft() -> None:
    """Find out before the work whether peft is there, in a release that transformers works with.

    Raises:
        IndexUnavailableError: it is not.
    """
    try:
        import peft
    except ImportError as error:
        raise IndexUnavailableError(
            'LoRA needs peft, which is not installed; pip install "memorizing[peft]"'
        ) from error
    import transformers
    from transformers.integrations.peft import MIN_PEFT_VERSION
    from transformers.utils.peft_utils import check_peft_version

    try:
        check_peft_version(MIN_PEFT_VERSION)
    except ValueError as error:
        raise IndexUnavailableError(
            f"peft {peft.__version__} is installed, and transformers {transformers.__version__} "
            f'works with {MIN_PEFT_VERSION} or newer; pip install "peft>={MIN_PEFT_VERSION}", or '
            "an older transformers"
        ) from error


_PLAIN = re.compile(r"[\w.]+")
"""Names in a configuration of peft that are no patterns."""


def _plan_lora(inner: Any, tensors: Mapping[str, Tensor], folder: Path) -> Any:
    """The LoRA that a folder describes, as far as it has a meaning here.

    Modules and ranks are those of its weights: patterns of somebody else are not matched, and
    nothing is made that is larger than the file. What would make peft import or compute something
    is refused.

    Raises:
        CheckpointError: it does not fit the model, or describes what is not known.
    """
    import peft

    path = folder / LORA_CONFIG_FILE
    values = read_json(path, CheckpointError, _REMEDY)
    if values.get("peft_type") != "LORA":
        raise CheckpointError(
            f"{path} describes {values.get('peft_type')!r}, and only LORA is read here; load it "
            "with peft alone"
        )
    modules = dict(inner.named_modules())
    ranks: dict[str, int] = {}
    for name, tensor in tensors.items():
        owner, is_lora, part = name.removeprefix(_PREFIX).partition(".lora_")
        side = {"A": 0, "embedding_A": 0, "B": 1, "embedding_B": 1}.get(part.partition(".")[0])
        if not is_lora or side is None:
            continue
        weight = getattr(modules.get(owner), "weight", None)
        if weight is None or tensor.dim() != 2 or tensor.shape[1 - side] not in weight.shape:
            raise CheckpointError(
                f"{folder} has LoRA of another model: {owner!r} here takes no "
                f"{tuple(tensor.shape)}; load it onto the model it was trained on"
            )
        ranks[owner] = tensor.shape[side]
    if not ranks:
        raise CheckpointError(f"{folder / LORA_FILE} has no weights of LoRA; {_REMEDY}")
    taken = {}
    for key, value in values.items():
        is_allowed = _TAKEN.get(key)
        if is_allowed is None and key not in _IGNORED and value not in (None, False, {}, []):
            raise CheckpointError(
                f"{path} has {key} = {value!r}, which is not known here; load it with peft alone"
            )
        if is_allowed is not None and value is not None:
            if not is_allowed(value):
                raise CheckpointError(f"{path} has {key} = {value!r}; it was altered: {_REMEDY}")
            taken[key] = value
    return peft.LoraConfig(
        **taken,
        task_type="CAUSAL_LM",
        r=max(ranks.values()),
        rank_pattern={re.escape(name): rank for name, rank in ranks.items()},
        target_modules=sorted(ranks),
    )


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def _are_plain(names: Any) -> bool:
    return all(isinstance(name, str) and _PLAIN.fullmatch(name) for name in names)


_TAKEN = {
    "lora_alpha": _is_number,
    "alpha_pattern": lambda value: (
        isinstance(value, dict) and _are_plain(value) and all(map(_is_number, value.values()))
    ),
    "lora_dropout": lambda value: _is_number(value) and 0 <= value < 1,
    "bias": lambda value: value in ("none", "all", "lora_only"),
    "modules_to_save": lambda value: isinstance(value, list) and _are_plain(value),
    **dict.fromkeys(
        ("fan_in_fan_out", "use_rslora", "use_dora", "lora_bias"),
        lambda value: isinstance(value, bool),
    ),
}
"""What is taken over from a configuration of peft, and what it must be."""
_IGNORED = (
    "auto_mapping", "base_model_name_or_path", "exclude_modules", "inference_mode",
    "init_lora_weights", "layers_pattern", "layers_to_transform", "megatron_core", "peft_type",
    "peft_version", "qalora_group_size", "r", "rank_pattern", "revision", "runtime_config",
    "target_modules", "task_type",
)  # fmt: skip
"""What has no meaning for weights that are there, or is told by them."""


def _put_in(inner: Any, config: Any) -> None:
    """Add a LoRA, in fp32 whatever the model is in. In place."""
    inner.add_adapter(config, "default")
    for name, parameter in inner.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.float()


def _remove_lora(inner: Any, flags: list[tuple[nn.Parameter, bool]]) -> None:
    """Take out what `_put_in` put in, as far as it came. In place."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils import AuxiliaryTrainingWrapper

    for name, module in list(inner.named_modules()):
        owner, _, child = name.rpartition(".")
        if isinstance(module, BaseTunerLayer):
            setattr(inner.get_submodule(owner), child, module.get_base_layer())
        elif isinstance(module, AuxiliaryTrainingWrapper):
            setattr(inner.get_submodule(owner), child, module.original_module)
    inner._hf_peft_config_loaded = False
    inner.__dict__.pop("peft_config", None)
    for parameter, requires_grad in flags:
        parameter.requires_grad_(requires_grad)


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
