"""Trial calls of a model: whether its family can have a memory, and how long its keys are."""

from __future__ import annotations

import torch
from torch import Tensor

from memorizing.errors import ConfigError
from memorizing.huggingface.attaching.calls import Calls

_NUM_TOKENS = 512


def collect_entries(calls: Calls, tokens: Tensor) -> dict[int, tuple[Tensor, Tensor]]:
    """Keys and values (1, H_kv, n, D) per memory layer of a text of n tokens, read in one call."""
    base = calls.decoder.base
    device = base.get_input_embeddings().weight.device
    was_training = base.training
    base.eval()
    try:
        with torch.no_grad(), calls.collect() as collected:
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


def check_family(calls: Calls) -> None:
    """Refuse a family that is not known and does not work as those that are.

    Of a text that is one token again and again, all keys must be the same once they are free of
    their positions.

    Raises:
        ConfigError: with what is wrong.
    """
    decoder = calls.decoder
    kind = decoder.base.config.model_type
    tokens = torch.full((min(7, calls.settings.window),), 1)
    problem = ""
    try:
        found = collect_entries(calls, tokens)
    except (RuntimeError, TypeError, ValueError, IndexError, KeyError) as error:
        found, problem = {}, f"a trial call failed: {error}"
    for layer in calls.settings.layers if not problem else ():
        if layer not in found:
            problem = f"layer {layer} does not call attention through AttentionInterface"
            break
        keys, values = found[layer]
        shape = (1, decoder.count_heads(layer)[1], len(tokens), decoder.count_head_dim(layer))
        if keys.shape != shape or values.shape != shape:
            problem = f"keys of layer {layer} are {tuple(keys.shape)} and not {shape}"
            break
        if not torch.allclose(keys, keys[:, :, :1].expand_as(keys), rtol=0.05, atol=0.05):
            problem = f"positions cannot be taken out of the keys of layer {layer}"
            break
    if problem:
        raise ConfigError(
            f"model_type {kind!r} is not among the known families, and does not work as they do: "
            f"{problem}"
        )
