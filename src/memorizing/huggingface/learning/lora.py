"""LoRA in a model of `transformers`: put in, found, listed, made again from peft's own files."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from memorizing.errors import CheckpointError, ConfigError, IndexUnavailableError
from memorizing.huggingface.attaching.attachment import check_finite, unwrap
from memorizing.huggingface.attaching.families import find_layers
from memorizing.storage.files import read_json
from memorizing.storage.tensors import check_shapes

LORA_CONFIG_FILE = "adapter_config.json"
LORA_FILE = "adapter_model.safetensors"
PREFIX = "base_model.model."
"""Of peft's names in its files."""
REMEDY = "save the adapter again, or copy the whole of it"


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
    put_in(inner, config)


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


def list_lora(inner: Any, lora: str) -> dict[str, Tensor]:
    """The weights of a LoRA, and of the modules that are saved with it, by name."""
    import peft

    tensors = peft.get_peft_model_state_dict(inner, adapter_name=lora, save_embedding_layers=False)
    return {name.removeprefix(PREFIX): tensor for name, tensor in tensors.items()}


def load_lora_weights(inner: Any, tensors: Mapping[str, Tensor], where: str) -> None:
    """Take over the weights that a file of peft holds. In place.

    Raises:
        CheckpointError: they are of another model, or not finite.
    """
    import peft

    named = {name.removeprefix(PREFIX): tensor for name, tensor in tensors.items()}
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


def plan_lora(inner: Any, tensors: Mapping[str, Tensor], folder: Path) -> Any:
    """The LoRA that a folder describes, as far as it has a meaning here.

    Modules and ranks are those of its weights: patterns of somebody else are not matched, and
    nothing is made that is larger than the file. What would make peft import or compute something
    is refused.

    Raises:
        CheckpointError: it does not fit the model, or describes what is not known.
    """
    import peft

    path = folder / LORA_CONFIG_FILE
    values = read_json(path, CheckpointError, REMEDY)
    if values.get("peft_type") != "LORA":
        raise CheckpointError(
            f"{path} describes {values.get('peft_type')!r}, and only LORA is read here; load it "
            "with peft alone"
        )
    modules = dict(inner.named_modules())
    ranks: dict[str, int] = {}
    for name, tensor in tensors.items():
        owner, is_lora, part = name.removeprefix(PREFIX).partition(".lora_")
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
        raise CheckpointError(f"{folder / LORA_FILE} has no weights of LoRA; {REMEDY}")
    taken = {}
    for key, value in values.items():
        is_allowed = _TAKEN.get(key)
        if is_allowed is None and key not in _IGNORED and value not in (None, False, {}, []):
            raise CheckpointError(
                f"{path} has {key} = {value!r}, which is not known here; load it with peft alone"
            )
        if is_allowed is not None and value is not None:
            if not is_allowed(value):
                raise CheckpointError(f"{path} has {key} = {value!r}; it was altered: {REMEDY}")
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


def put_in(inner: Any, config: Any) -> None:
    """Add a LoRA, in fp32 whatever the model is in. In place."""
    inner.add_adapter(config, "default")
    for name, parameter in inner.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.float()


def remove_lora(inner: Any, flags: list[tuple[nn.Parameter, bool]]) -> None:
    """Take out what `put_in` put in, as far as it came. In place."""
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
