"""Which models can have a memory: where families differ, and a trial call that tells the rest."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from memorizing.errors import ConfigError
from memorizing.huggingface.attaching.calls import Calls
from memorizing.huggingface.attaching.decoder import Decoder, Family, find_rotation
from memorizing.huggingface.attaching.interface import STEP, Attention, name_implementation
from memorizing.huggingface.releases import CACHE_NAME
from memorizing.settings import require

FAMILIES: dict[str, Family] = {
    "gpt2": Family("h", "attn", "learned"),
    "gpt_bigcode": Family("h", "attn", "learned"),
    "gpt_neox": Family(attention="attention"),
    "modernbert-decoder": Family(attention="attn"),
} | dict.fromkeys(
    (
        "afmoe", "apertus", "arcee", "aria_text", "beam", "bitnet", "cohere", "cohere2",
        "cohere2_moe", "cwm", "dots1", "ernie4_5", "ernie4_5_moe", "exaone4", "exaone_moe",
        "flex_olmo", "flint", "gemma", "gemma2", "gemma3_text", "gemma3n_text", "gemma4_text",
        "gemma4_unified_text", "glm", "glm4", "glm4_moe", "gpt_oss", "granite", "granite_swa",
        "granitemoe", "granitemoe_swa", "granitemoeshared", "helium", "hy_v3", "hyperclovax",
        "jais2", "kolibri1", "laguna", "llama", "mellum", "mimo_v2_flash", "minimax_m2",
        "ministral", "ministral3", "mistral", "mixtral", "nanochat", "olmo", "olmo2", "olmo3",
        "olmoe", "phi", "phi3", "phimoe", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "seed_oss",
        "smollm3", "solar_open", "starcoder2", "vaultgemma",
    ),
    Family(),
)  # fmt: skip
"""By `config.model_type`; each is tested. Others are taken as `Family()` where a trial call of
`find_decoder` finds nothing else in them."""

_TRIAL_TOKENS = ((1, 2), (2, 1))
_NUM_TOKENS = 512


class _UnlikeError(Exception):
    """What a family does otherwise."""


def find_layers(model: Any) -> tuple[Any, Family, nn.ModuleList]:
    """The base model of a causal language model of `transformers`, its family and its layers.

    Raises:
        ConfigError: a family that keeps its layers elsewhere.
    """
    base, family = model.base_model, FAMILIES.get(str(model.config.model_type), Family())
    layers = getattr(base, family.layers, None)
    if not hasattr(model, "generate"):
        raise _refuse(model, "it does not generate by itself, and its wrapper makes its own cache")
    if not isinstance(layers, nn.ModuleList):
        raise _refuse(model, "its layers are not laid out as in the families that are known")
    return base, family, layers


def find_decoder(model: Any) -> Decoder:
    """The decoder inside of a causal language model of `transformers`, which has no memory yet.

    A trial call of the base model tells of every layer whether and how it rotates, how many heads
    it has, and that its attention and its cache are what a memory takes them for.

    Raises:
        ConfigError: a family that keeps its attention elsewhere, does not call attention through
            `AttentionInterface`, or does something else with what it attends to.
    """
    base, family, layers = find_layers(model)
    implementation = str(model.config._attn_implementation)
    name = name_implementation(implementation)
    if implementation == "eager" and getattr(model.config, "reorder_and_upcast_attn", False):
        raise ConfigError(
            "reorder_and_upcast_attn is true, which works by itself only; load the model with "
            "attn_implementation='sdpa'"
        )
    try:
        found = [getattr(layer, family.attention, None) for layer in layers]
        attentions = tuple(one for one in found if isinstance(one, nn.Module))
        if len(attentions) < len(layers):
            raise _UnlikeError("not all of its layers have attention")
        if not getattr(base, "_supports_attention_backend", False):
            raise _UnlikeError("its layers do not call attention through AttentionInterface")
        if family.positions == "rotary" and not (
            hasattr(base, "rotary_emb") and find_rotation(attentions[0])
        ):
            raise _UnlikeError("its layers do not rotate queries and keys as known families do")
        own_windows, num_cached = _find_own_windows(base.config, len(layers))
        decoder = Decoder(base, family, attentions, own_windows, num_cached)
        seen, cache = _call_on_trial(model, decoder, name)
        examined = [
            _examine(decoder, number, seen.get(attention, []), cache)
            for number, attention in enumerate(attentions)
        ]
    except _UnlikeError as error:
        raise _refuse(model, str(error)) from None
    except (RuntimeError, TypeError, ValueError, LookupError, AttributeError) as error:
        raise _refuse(model, f"a trial call failed: {error}") from error
    rotated, shapes = zip(*examined, strict=True)
    return dataclasses.replace(decoder, rotated=rotated, shapes=shapes)


def _refuse(model: Any, problem: str) -> ConfigError:
    return ConfigError(
        f"a {type(model).__name__} (model_type {str(model.config.model_type)!r}) cannot be given "
        f"a memory: {problem}; give a text model (...ForCausalLM) of a family that works as those "
        f"that are known: {', '.join(sorted(FAMILIES))}"
    )


def _find_own_windows(config: Any, num_layers: int) -> tuple[tuple[int | None, ...], int]:
    """`Decoder.own_windows` and `Decoder.num_cached`."""
    layers = DynamicCache(config=config).layers or [DynamicLayer() for _ in range(num_layers)]
    known = (DynamicLayer, DynamicSlidingWindowLayer)
    num_shared = getattr(config, "num_kv_shared_layers", 0) or 0
    layers = layers[: num_layers - num_shared]
    if len(layers) != num_layers - num_shared or any(type(layer) not in known for layer in layers):
        raise _UnlikeError("its cache holds something else than keys and values of every layer")
    windows = [getattr(layer, "sliding_window", None) for layer in layers]
    for kind in config.layer_types[len(layers) :] if num_shared else ():
        windows.append(config.sliding_window if kind == "sliding_attention" else None)
    return tuple(windows), len(layers)


def _call_on_trial(
    model: Any, decoder: Decoder, name: str
) -> tuple[dict[nn.Module, list[Attention]], DynamicCache]:
    """What attention sees of pairs of tokens at several positions, and the cache of the call."""
    base, before = decoder.base, model.config._attn_implementation
    was_training = base.training
    most = decoder.max_positions
    firsts = [[start] for start in (0, 1, max(2, most // 2 - 2))]
    position_ids = torch.tensor(firsts).repeat(len(_TRIAL_TOKENS), 1) + torch.arange(2)
    tokens = torch.tensor(_TRIAL_TOKENS).repeat_interleave(len(firsts), 0)
    device = base.get_input_embeddings().weight.device
    seen: dict[nn.Module, list[Attention]] = {}
    model.set_attn_implementation(name)
    try:
        if model.config._attn_implementation != name:
            raise _UnlikeError("it does not let its attention be set")
        base.eval()
        with torch.no_grad():
            output = base(
                input_ids=tokens.to(device),
                position_ids=position_ids.to(device),
                use_cache=True,
                return_dict=True,
                **{STEP: seen},
            )
    finally:
        base.train(was_training)
        model.set_attn_implementation(before)
    return seen, output[CACHE_NAME]


def _examine(
    decoder: Decoder, number: int, calls: list[Attention], cache: DynamicCache
) -> tuple[bool, tuple[int, int, int]]:
    """Whether a layer rotates, and its shape; see `Decoder`."""
    if len(calls) != 1:
        raise _UnlikeError(
            f"layer {number} calls attention {len(calls)} times through AttentionInterface, and "
            "not once"
        )
    query, key, value, mask, _, kwargs, output = calls[0]
    num_heads, head_dim = query.shape[1], query.shape[3]
    num_key_heads = key.shape[1]
    if (
        num_heads % num_key_heads
        or value.shape[:3] != key.shape[:3]
        or key.shape[3] != head_dim
        or value.shape[3] > head_dim
        or (mask is not None and mask.dtype != torch.bool and bool((mask > 0).any()))
        or not _is_close(output, _attend(calls[0]))
    ):
        raise _UnlikeError(f"attention of layer {number} is no softmax over all of its keys")
    held: Any = cache.layers[number] if number < decoder.num_cached else None
    if held is not None and not (_is_close(held.keys, key) and _is_close(held.values, value)):
        raise _UnlikeError(f"the cache of layer {number} holds something else than its keys")
    # A first token sees nothing but itself: only its position differs from row to row.
    firsts = key[:, :, :1]
    shape = (num_heads, num_key_heads, head_dim)
    if decoder.family.positions == "learned" or (_is_alike(firsts) and bool(firsts.any())):
        return False, shape
    positions = kwargs.get("position_ids")
    if positions is None:
        raise _UnlikeError(f"attention of layer {number} is not told the positions of its tokens")
    if not _is_alike(decoder.rotate_back(number, firsts, positions[:, :1])):
        raise _UnlikeError(f"positions cannot be taken out of the keys of layer {number}")
    return True, shape


def _attend(seen: Attention) -> Tensor:
    """Attention (B, 2, H, D) over two tokens, in plain operations."""
    query, key, value, _, scaling, kwargs, _ = seen
    num_groups = query.shape[1] // key.shape[1]
    key, value = (part.repeat_interleave(num_groups, 1).float() for part in (key, value))
    scores = query.float() @ key.mT * (query.shape[3] ** -0.5 if scaling is None else scaling)
    if (softcap := kwargs.get("softcap")) is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores + torch.full((2, 2), -torch.inf, device=scores.device).triu(1)
    if (sink := kwargs.get("s_aux")) is not None:
        sinks = sink.float().view(1, -1, 1, 1).expand(len(scores), -1, 2, 1)
        scores = torch.cat([scores, sinks], -1)
    return (torch.softmax(scores, -1)[..., :2] @ value).transpose(1, 2)


def _is_alike(keys: Tensor) -> bool:
    """Whether rows (B, H, n, D) of the same token have the same keys."""
    rows = keys.unflatten(0, (len(_TRIAL_TOKENS), -1))
    return _is_close(rows, rows[:, :1].expand_as(rows))


def _is_close(found: Tensor | None, expected: Tensor) -> bool:
    """Whether all are the same, as far as 16-bit models compute."""
    if found is None or found.shape != expected.shape:
        return False
    found, expected = found.float(), expected.float()
    return bool((found - expected).abs().max() <= 0.05 * expected.abs().max())


def collect_entries(calls: Calls, tokens: Tensor) -> dict[int, tuple[Tensor, Tensor]]:
    """Keys and values (1, H_kv, n, D) per memory layer of a text of n tokens, read in one call."""
    base = calls.decoder.base
    device = base.get_input_embeddings().weight.device
    was_training = base.training
    base.eval()
    try:
        with calls.collect() as collected:
            base(input_ids=tokens.unsqueeze(0).to(device), use_cache=False)
    finally:
        base.train(was_training)
    return collected


def measure_key_norms(calls: Calls) -> None:
    """Set what unit keys are multiplied by: the mean norm of the keys of each head.

    It is measured on the same pseudo-random tokens of the vocabulary always, so that one model has
    one norm. Changes the memory layers in place.
    """
    vocab_size = calls.decoder.base.get_input_embeddings().weight.shape[0]
    num_tokens = min(_NUM_TOKENS, calls.settings.window)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(vocab_size, (num_tokens,), generator=generator)
    for layer, (keys, _) in collect_entries(calls, tokens).items():
        calls.layers[layer].set_key_norm(keys[0].float().norm(dim=-1).mean(-1))


def check_heads(heads: Mapping[int, Sequence[int]], layers: Sequence[int], num_heads: int) -> None:
    """Refuse heads that are not there, or of other layers.

    Raises:
        ConfigError: with the heads seen.
    """
    for layer, given in heads.items():
        require(
            layer in layers and bool(given) and all(0 <= head < num_heads for head in given),
            f"heads[{layer}]",
            list(given),
            f"one or more from 0 to {num_heads - 1}, of the memory layers {list(layers)}",
        )


def check_layers(layers: tuple[int, ...], num_layers: int) -> None:
    """Refuse layers that are not there, or are named twice.

    Raises:
        ConfigError: with the layers seen.
    """
    require(
        bool(layers) and all(0 <= layer < num_layers for layer in layers),
        "layers",
        list(layers),
        f"one or more from 0 to {num_layers - 1}, counted from 0 (this model has {num_layers})",
    )
    require(len(set(layers)) == len(layers), "layers", list(layers), "each layer once")
