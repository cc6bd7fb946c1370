"""Inputs of a call of our own model: which columns are tokens, which logits are wanted, the loss.

Shapes: B rows, T columns of the call, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from memorizing.errors import ConfigError, StateError
from memorizing.huggingface.own_model.cache import CACHE_NAME, MemorizingCache
from memorizing.loss import sum_nats

IGNORED_LABEL = -100
"""The label of a token that is not predicted, as `transformers` has it."""

_REASONS = {
    "inputs_embeds": "tokens are embedded by the model itself: give input_ids",
    "position_ids": "positions follow from attention_mask and the history",
    "output_attentions": "this model does not return attentions",
    "output_hidden_states": "this model does not return hidden states",
}


def refuse_unknown(inputs: Mapping[str, Any]) -> None:
    """Refuse inputs of a call that would have no effect.

    Raises:
        ConfigError: for the first that is neither None nor False.
    """
    for name, value in inputs.items():
        if value is not None and value is not False:
            reason = _REASONS.get(name, "this model does not know it")
            raise ConfigError(f"{name} cannot be used here: {reason}")


def choose_cache(past_key_values: object, cache: object) -> object:
    """The history of a call, under whichever of its two names it was given.

    Raises:
        ConfigError: it was given under both.
    """
    if past_key_values is not None and cache is not None:
        raise ConfigError(
            "past_key_values and cache are two names of one history; give it once, as cache since "
            "transformers 5.24"
        )
    return past_key_values if cache is None else cache


def check_cache(cache: object) -> MemorizingCache:
    """The history itself, if it is one of ours.

    Raises:
        StateError: a cache of another kind.
    """
    if not isinstance(cache, MemorizingCache):
        raise StateError(
            f"{CACHE_NAME} is a {type(cache).__name__}; the history of this model is a "
            "MemorizingCache: pass what a call returned or model.init_cache(num_rows), or leave it "
            "out"
        )
    return cache


def find_valid(mask: Tensor | None, tokens: Tensor, num_before: int) -> Tensor:
    """Which columns of a call are tokens: (B, T) bool on the CPU.

    Args:
        mask: (B, T), or with the columns before; not 0 where there is a token. None is all.
        tokens: (B, T).
        num_before: columns read before.

    Raises:
        ConfigError: a mask of another shape.
    """
    num_rows, num_columns = tokens.shape
    if mask is None:
        return torch.ones(num_rows, num_columns, dtype=torch.bool)
    widths = {num_columns, num_before + num_columns}
    if mask.dim() != 2 or mask.shape[0] != num_rows or mask.shape[1] not in widths:
        allowed = " or ".join(f"({num_rows}, {width})" for width in sorted(widths))
        raise ConfigError(f"attention_mask is {tuple(mask.shape)}; it must be {allowed}")
    return mask[:, -num_columns:].cpu() != 0


def choose_columns(num_columns: int, wanted: int | Tensor) -> tuple[Tensor, Tensor | None]:
    """Columns whose logits are returned: (T,) bool on the CPU, and their order.

    Args:
        num_columns: T.
        wanted: the last so many, 0 for all; or the columns themselves, in any order.

    Returns:
        The mask, and for each column of a tensor its place among those of the mask.
    """
    is_kept = torch.zeros(num_columns, dtype=torch.bool)
    if isinstance(wanted, int):
        is_kept[-wanted if wanted else 0 :] = True
        return is_kept, None
    columns = torch.arange(num_columns)[wanted.cpu()]
    is_kept[columns] = True
    return is_kept, (is_kept.cumsum(0) - 1)[columns]


def compute_loss(
    logits: Tensor, labels: Tensor, valid: Tensor, num_items: int | Tensor | None
) -> Tensor:
    """Nats of the next token, summed and divided by `num_items`, or by the targets counted here.

    A target counts where its label is not `IGNORED_LABEL` and neither it nor the token before it is
    padding.

    Args:
        logits: (B, T, V).
        labels: (B, T) int64, not shifted.
        valid: (B, T) bool: tokens that are not padding.
        num_items: targets of all calls that are added up before a step.
    """
    valid = valid.to(logits.device)
    targets = torch.full_like(labels, IGNORED_LABEL, device=logits.device)
    targets[:, :-1] = labels[:, 1:]
    counted = (targets != IGNORED_LABEL) & valid
    counted[:, :-1] &= valid[:, 1:]
    nats = sum_nats(logits, targets, counted)
    if num_items is None:
        return nats / counted.sum().clamp(min=1)
    return nats / (num_items.to(nats.device) if isinstance(num_items, Tensor) else num_items)
