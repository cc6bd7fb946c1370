"""What `generate` of our own model refuses before anything is computed, and why."""

from __future__ import annotations

from torch import Tensor
from transformers import GenerationConfig
from transformers.generation.configuration_utils import GenerationMode

from memorizing.errors import ConfigError, StateError
from memorizing.huggingface.own_model.cache import CACHE_NAME, MemorizingCache

_ONE_TOKEN_AFTER_ANOTHER = (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE)
_CACHES = (None, "dynamic")


def check_settings(
    settings: GenerationConfig, assistant_model: object, custom_generate: object
) -> None:
    """Refuse ways of decoding that take tokens back or move them between rows.

    Raises:
        ConfigError: with the setting and what works.
    """
    mode = settings.get_generation_mode(assistant_model)  # type: ignore[arg-type]
    if mode not in _ONE_TOKEN_AFTER_ANOTHER:
        raise ConfigError(
            f"these settings ask for {mode.value.replace('_', ' ')}, which takes tokens back or "
            "moves them between rows; what a model with memory has read stays read: use "
            "num_beams=1 without assistant, greedy or with do_sample=True"
        )
    if isinstance(custom_generate, str):
        raise ConfigError(
            f"custom_generate is {custom_generate!r}; a way of decoding from the hub is not known "
            "to be right with a memory: give a function of your own, or leave it out"
        )
    if settings.cache_implementation not in _CACHES:
        raise ConfigError(
            f"cache_implementation is {settings.cache_implementation!r}; the history of this model "
            "is a MemorizingCache: leave the setting out"
        )
    for name in ("output_attentions", "output_hidden_states"):
        if getattr(settings, name):
            raise ConfigError(f"{name} is true, and this model does not return them; leave it out")


def check_inputs(
    input_ids: Tensor,
    attention_mask: Tensor | None,
    cache: MemorizingCache | None,
    settings: GenerationConfig,
) -> None:
    """Refuse tokens, mask and history that do not belong together.

    Raises:
        ConfigError: padding on the right, or padding that no mask tells.
        StateError: tokens that do not go on where the history ends.
    """
    width = input_ids.shape[1]
    if attention_mask is not None:
        if not bool(attention_mask[:, -1].all()):
            raise ConfigError(
                "attention_mask has padding on the right, where the next token belongs; use "
                "tokenizer.padding_side = 'left'"
            )
    elif _begins_with_padding(input_ids, settings):
        raise ConfigError(
            f"a row begins with padding, token {settings.pad_token_id}; give the attention_mask "
            "that the tokenizer returned"
        )
    if cache is None:
        return
    num_rows = len(input_ids) * (settings.num_return_sequences or 1)
    if cache.batch_size != num_rows:
        raise StateError(
            f"{CACHE_NAME} has {cache.batch_size} rows and {num_rows} sequences are asked for; "
            "copy its rows with cache.batch_repeat_interleave(num_return_sequences)"
        )
    num_read = cache.get_seq_length()
    mask_width = width if attention_mask is None else attention_mask.shape[1]
    if mask_width != width:  # Only new tokens; the mask is over all.
        if mask_width != num_read + width:
            raise StateError(
                f"{CACHE_NAME} has read {num_read} columns and {width} follow, but "
                f"attention_mask has {mask_width}; it must have {num_read + width}"
            )
        return
    if width <= num_read:
        raise StateError(
            f"{CACHE_NAME} has read {num_read} columns and input_ids has {width}; give the "
            "whole conversation with new tokens at its end, or only the new tokens with an "
            "attention_mask over the whole"
        )
    if cache.last_tokens is not None:
        last = input_ids[:, num_read - 1].repeat_interleave(num_rows // len(input_ids))
        if not bool((last.to(cache.last_tokens.device) == cache.last_tokens).all()):
            raise StateError(
                f"column {num_read - 1} of input_ids is not what {CACHE_NAME} read there; give "
                "the same conversation with new tokens at its end"
            )


def _begins_with_padding(tokens: Tensor, settings: GenerationConfig) -> bool:
    padding = settings.pad_token_id
    if padding is None:
        return False
    # One start token is no padding, though its id may be the same.
    num_first = 2 if settings.bos_token_id in (None, padding) else 1
    first = tokens[:, :num_first]
    return first.shape[1] == num_first and bool((first == padding).all(1).any())
