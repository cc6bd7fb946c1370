"""What stored entries depend on, as one short text: compared before a memory is used."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import torch
from torch import Tensor

from memorizing.huggingface.attaching.families import Decoder
from memorizing.huggingface.attaching.memory_settings import MemorySettings

_NUM_SAMPLES = 4096
_MATTERS = (
    "act", "eps", "head", "layer_types", "multiplier", "parallel", "rope", "rotary", "scal",
    "softcap", "window",
)  # fmt: skip
"""Parts of the names of those settings of a model that its entries depend on. Others come and go
with the releases of `transformers`, or show in the weights."""


def compute_fingerprint(decoder: Decoder, settings: MemorySettings) -> str:
    """Of the configuration and every weight up to the last memory layer; gates are left out.

    Of each weight, rounded to bf16 so that it does not depend on the dtype a model is loaded in,
    the sum of all bits as integers and a few thousand numbers are hashed: a pass over the memory,
    where hashing all would take seconds. What changes entries but little, such as a change of a
    single weight and its opposite in another, is not told apart. LoRA that is not merged makes
    another model.
    """
    digest = hashlib.sha256()
    config = decoder.base.config.to_dict()
    matters = {
        key: value
        for key, value in config.items()
        if value not in (None, False) and any(part in key for part in _MATTERS)
    }
    stored = {"search": settings.search, "num_sinks": settings.num_sinks}
    _add(
        digest,
        json.dumps([decoder.base.config.model_type, matters, stored], default=str, sort_keys=True),
    )
    last = max(settings.layers)
    layers = f"{decoder.family.layers}."
    for name, weight in sorted(decoder.base.state_dict(keep_vars=True).items()):
        if f".{decoder.family.attention}.memory." in name:
            continue
        if name.startswith(layers):
            number = int(name[len(layers) :].partition(".")[0])
            # Above the last memory layer nothing reaches the entries.
            if number > last:
                continue
        elif name.startswith(("norm.", "ln_f.", "final_layer_norm.")):
            continue
        _add(digest, name)
        _add_weight(digest, weight.detach())
    return digest.hexdigest()[:32]


def _add(digest: Any, text: str) -> None:
    digest.update(text.encode() + b"\n")


def _add_weight(digest: Any, weight: Tensor) -> None:
    flat = weight.reshape(-1)
    _add(digest, f"{tuple(weight.shape)}")
    if not flat.numel():
        return
    if flat.is_floating_point():
        flat = flat.to(torch.bfloat16).view(torch.int16)
    _add(digest, str(int(flat.sum(dtype=torch.int64))))
    step = max(1, flat.numel() // _NUM_SAMPLES)
    digest.update(flat[::step].contiguous().cpu().numpy().tobytes())


def hash_tokenizer(tokenizer: Any) -> str:
    """Of everything that decides which tokens a text becomes."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    text = (
        backend.to_str()
        if backend is not None
        else json.dumps(tokenizer.get_vocab(), sort_keys=True)
    )
    return hashlib.sha256(text.encode()).hexdigest()[:32]
