"""What stored entries depend on: computed when a memory is opened, compared before it is used."""

from __future__ import annotations

import hashlib
import itertools
import json
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from memorizing.errors import ConfigError
from memorizing.huggingface.attaching.decoder import Decoder
from memorizing.huggingface.attaching.memory_settings import MemorySettings

Fingerprint = dict[str, Any]
"""What `compute_fingerprint` gives; JSON."""

_NUM_SAMPLES = 4096
_BLOCK = 32
"""Tokens whose embeddings are compared together."""
_NUM_ADDED = 3
"""Last blocks of a vocabulary that are not compared: 64 tokens or more. Those may have been added,
as for padding, and begin at random in every process."""
_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}
_MATTERS = (
    "act", "eps", "head", "layer_types", "multiplier", "parallel", "rope", "rotary", "scal",
    "softcap", "window",
)  # fmt: skip
"""Parts of the names of those settings of a model that its entries depend on. Others come and go
with the releases of `transformers`, or show in the weights."""


def compute_fingerprint(decoder: Decoder, settings: MemorySettings) -> Fingerprint:
    """Of the configuration and every weight that entries depend on; gates and scales are left out.

    These are the weights up to the last layer that is kept, and adapters of peft that are in force
    there: neither switched off nor merged, with their scales. Of each weight, the sum of all bits
    as integers and a few thousand numbers are hashed: a pass over the memory, where hashing all
    would take seconds. What changes entries but little, such as a change of a single weight and its
    opposite in another, is not told apart.

    Weights are rounded to bf16 and to fp16, so that a model in fp32 is known by either. One in fp16
    has lost what it would be in bf16, and the other way round. Embeddings are hashed 32 tokens
    at a time: those of the last tokens, which may have been added, do not matter.

    Raises:
        ConfigError: weights that are not there, as with offloading.
    """
    weights = list(_list_weights(decoder, _find_last(decoder, settings)))
    embedding = decoder.base.get_input_embeddings().weight
    dtypes = {weight.dtype for _, weight in weights}
    found: Fingerprint = {
        "search": settings.search,
        "num_sinks": settings.num_sinks,
        "config": _hash(_describe_config(decoder)),
        "dtypes": sorted(str(dtype).removeprefix("torch.") for dtype in dtypes),
    }
    for name, dtype in _DTYPES.items():
        if dtypes & {*_DTYPES.values()} <= {dtype}:
            digest = hashlib.sha256()
            for path, weight in weights:
                if weight is not embedding:
                    _add(digest, path)
                    _add_weight(digest, weight.detach(), dtype)
            found[f"{name}_weights"] = digest.hexdigest()[:32]
            found[f"{name}_tokens"] = _hash_tokens(embedding.detach(), dtype)
    return found


def shorten(fingerprint: Fingerprint) -> str:
    """A fingerprint as one short text."""
    return _hash(json.dumps(fingerprint, sort_keys=True))


def explain_difference(
    stored: Fingerprint | str, mine: Fingerprint, decoder: Decoder, settings: MemorySettings
) -> str | None:
    """Why entries with the stored fingerprint are not those of a model; None where they are.

    Args:
        stored: of the entries. A text is of the first format: a single hash of what it looked at.
        mine: of the model now.
        decoder: the model, for a text.
        settings: of its memory, likewise.
    """
    if isinstance(stored, str):
        same = stored == hash_model(decoder, settings)
        return None if same else "by another model, or with another search or num_sinks"
    for name in ("search", "num_sinks"):
        if stored.get(name) != mine[name]:
            return f"with {name} = {stored.get(name)!r}, and here it is {mine[name]!r}"
    if stored.get("config") != mine["config"]:
        return "by another model: its configuration differs"
    shared = [name for name in _DTYPES if f"{name}_weights" in stored and f"{name}_weights" in mine]
    if not shared:
        return (
            f"by a model in {stored.get('dtypes')}, which cannot be told from another in "
            f"{mine['dtypes']}; load it in the same dtype, or in float32"
        )
    # A model in fp32 may have been in fp16 or bf16 in between.
    reasons = [_compare_weights(stored, mine, name) for name in shared]
    return None if None in reasons else reasons[0]


def _compare_weights(stored: Fingerprint, mine: Fingerprint, dtype: str) -> str | None:
    if stored[f"{dtype}_weights"] != mine[f"{dtype}_weights"]:
        return "by another model, or with other adapters in force: its weights differ"
    theirs, own = str(stored.get(f"{dtype}_tokens")), mine[f"{dtype}_tokens"]
    end = max(0, min(len(theirs), len(own)) - 2 * _NUM_ADDED)
    return None if theirs[:end] == own[:end] else "by another model: its embeddings differ"


def _describe_config(decoder: Decoder, *stored: Any) -> str:
    config = decoder.base.config
    matters = {
        key: value
        for key, value in config.to_dict().items()
        if value not in (None, False) and any(part in key for part in _MATTERS)
    }
    return json.dumps([config.model_type, matters, *stored], default=str, sort_keys=True)


def _flatten(name: str, value: Any) -> Iterator[tuple[str, Tensor]]:
    """The tensors of which a weight consists: several where it is quantized."""
    if isinstance(value, (list, tuple)):
        for place, part in enumerate(value):
            yield from _flatten(f"{name}.{place}", part)
    elif isinstance(value, Tensor) and is_traceable_wrapper_subclass(value):
        for part in value.__tensor_flatten__()[0]:
            yield from _flatten(f"{name}.{part}", getattr(value, part))
    elif isinstance(value, Tensor):
        yield name, value.dequantize() if value.is_quantized else value


def _list_weights(decoder: Decoder, last: int) -> Iterator[tuple[str, Tensor]]:
    """Weights that entries of the layers up to `last` depend on, by the names without peft."""
    in_force = _find_adapters(decoder.base)
    held = decoder.base.state_dict(keep_vars=True)
    tensors = itertools.chain.from_iterable(_flatten(*item) for item in sorted(held.items()))
    for name, weight in tensors:
        if not _reaches_entries(decoder, name, last):
            continue
        if weight.is_meta:
            raise ConfigError(
                f"the weight {name} is on the meta device, as with offloading, so that the model "
                "cannot be told from others; load it whole, without device_map"
            )
        owner = name
        while owner and owner not in in_force:
            owner = owner.rpartition(".")[0]
        if not owner:
            yield name, weight
            continue
        part, _, rest = name[len(owner) + 1 :].partition(".")
        adapters, scales = in_force[owner]
        if part in ("base_layer", "original_module"):
            if part == "base_layer" or not adapters:
                yield f"{owner}.{rest}", weight
        elif (adapter := rest.partition(".")[0]) in adapters:
            if part == "modules_to_save":
                yield f"{owner}.{rest.partition('.')[2]}", weight
            else:
                yield f"{owner}.{part} {scales.get(adapter)}", weight


def _find_last(decoder: Decoder, settings: MemorySettings) -> int:
    return settings.list_kept(decoder.num_cached)[-1]


def _reaches_entries(decoder: Decoder, name: str, last: int) -> bool:
    layers = f"{decoder.family.layers}."
    if f".{decoder.family.attention}.memory." in name:
        return False
    if name.startswith(layers):
        # Above the last layer that is kept nothing reaches the entries.
        return int(name[len(layers) :].partition(".")[0]) <= last
    return not name.startswith(("norm.", "ln_f.", "final_layer_norm."))


def _find_adapters(base: Any) -> dict[str, tuple[list[str], dict[str, float]]]:
    """Per module that peft put in, the adapters that it computes with, and their scales."""
    if "peft" not in sys.modules:
        return {}
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils import AuxiliaryTrainingWrapper

    found = {}
    for name, module in base.named_modules():
        if isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper)):
            # A wrapper passes on what it is asked for to what it wraps.
            is_layer = isinstance(module, BaseTunerLayer)
            is_off = module.disable_adapters or (is_layer and module.merged)
            scales = dict(getattr(module, "scaling", {})) if is_layer else {}
            found[name] = ([] if is_off else list(module.active_adapters), scales)
    return found


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def _hash_tokens(embedding: Tensor, dtype: torch.dtype) -> str:
    """Two hexadecimal digits for the embeddings of every 32 tokens."""
    parts = []
    for block in embedding.split(_BLOCK):
        digest = hashlib.sha256()
        _add_weight(digest, block, dtype, num_samples=16)
        parts.append(digest.hexdigest()[:2])
    return "".join(parts)


def _add(digest: Any, text: str) -> None:
    digest.update(text.encode() + b"\n")


def _sum_numbers(flat: Tensor) -> int:
    return int(flat.sum(dtype=torch.int64))


def _sum_bits(flat: Tensor) -> int:
    """Four numbers of 16 bits at once, modulo 2^64: several times faster than one by one."""
    if flat.element_size() != 2:
        return _sum_numbers(flat)
    num_whole = flat.numel() // 4 * 4
    flat = flat.clone() if flat.storage_offset() % 4 else flat
    return int(flat[:num_whole].view(torch.int64).sum()) + _sum_numbers(flat[num_whole:])


def _add_weight(
    digest: Any,
    weight: Tensor,
    dtype: torch.dtype,
    num_samples: int = _NUM_SAMPLES,
    sum_bits: Callable[[Tensor], int] = _sum_bits,
) -> None:
    flat = weight.reshape(-1)
    _add(digest, f"{tuple(weight.shape)}")
    if not flat.numel():
        return
    if flat.is_floating_point():
        flat = flat.to(dtype).view(torch.int16)
    _add(digest, str(sum_bits(flat)))
    step = max(1, flat.numel() // num_samples)
    digest.update(flat[::step].contiguous().cpu().numpy().tobytes())


def hash_model(decoder: Decoder, settings: MemorySettings) -> str:
    """One hash of the configuration and all weights that entries depend on, in bf16.

    Also of adapters that are not in force, and of every embedding. It is what folders of the first
    format have, and what runs know their base model by.
    """
    digest = hashlib.sha256()
    stored = {"search": settings.search, "num_sinks": settings.num_sinks}
    _add(digest, _describe_config(decoder, stored))
    for name, weight in sorted(decoder.base.state_dict(keep_vars=True).items()):
        if _reaches_entries(decoder, name, _find_last(decoder, settings)):
            _add(digest, name)
            _add_weight(digest, weight.detach(), torch.bfloat16, sum_bits=_sum_numbers)
    return digest.hexdigest()[:32]
