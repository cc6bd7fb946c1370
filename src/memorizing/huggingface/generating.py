"""Which ways to generate work where what was read is remembered; of our own model and of others."""

from __future__ import annotations

from typing import Any, NoReturn

from transformers import GenerationConfig
from transformers.generation.configuration_utils import GenerationMode

from memorizing.errors import ConfigError
from memorizing.huggingface.releases import CACHE_NAME

_MODES = (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE)
"""One token after another, each row by itself: what beams exchange and assistants take back is in
memory already."""
_CACHES = (None, "dynamic")


def check_generation(settings: GenerationConfig, cache: object) -> None:
    """Refuse settings of `generate` that cannot be right with a memory.

    Args:
        settings: what the call and the model's own settings come to.
        cache: that the call goes on with, or None.

    Raises:
        ConfigError: with the setting and what works.
    """
    check_mode(settings.get_generation_mode())
    if settings.cache_implementation not in _CACHES:
        raise ConfigError(
            f"cache_implementation is {settings.cache_implementation!r}; a model with memory keeps "
            "a cache of its own: leave the setting out"
        )
    if cache is not None and not settings.use_cache:
        raise ConfigError(f"use_cache is false with {CACHE_NAME}; leave one of them out")


def check_mode(mode: GenerationMode) -> None:
    """Refuse ways of decoding that take tokens back or move them between rows.

    Raises:
        ConfigError: with what works.
    """
    if mode not in _MODES:
        raise ConfigError(
            f"these settings ask for {mode.value.replace('_', ' ')}, which takes tokens back or "
            "moves them between rows; what a model with memory has read stays read: use "
            "num_beams=1 without assistant, greedy or with do_sample=True"
        )


def refuse_code(name: object, *args: Any, **kwargs: Any) -> NoReturn:
    """In the place of `load_custom_generate`, which loads what `generate` was told to run.

    Raises:
        ConfigError: always.
    """
    raise ConfigError(
        f"custom_generate is {str(name)!r}; code that comes with a way of decoding is not run, nor "
        "is it known to be right with a memory: give a function of your own, or leave it out"
    )


def refuse_batching(*args: Any, **kwargs: Any) -> NoReturn:
    """In the place of `init_continuous_batching`, which `generate_batch` begins with.

    Raises:
        ConfigError: always.
    """
    raise ConfigError(
        "continuous batching moves sequences between rows, each of which has a memory of its own; "
        "call generate with a batch"
    )


def forget_sampling(model: Any) -> None:
    """Leave out a model's own settings of sampling and length. In place."""
    own = model.generation_config
    own.do_sample, own.temperature, own.top_p, own.top_k, own.max_length = (None,) * 5
    # It holds tokens back that were read: those of a quote.
    own.repetition_penalty = None


def choose_sampling(temperature: float, top_p: float) -> dict[str, Any]:
    """Arguments of `generate`: the likeliest token at 0, else from those that have `top_p`."""
    if temperature == 0.0:
        return {"do_sample": False}
    return {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": 0}


def choose_padding(tokenizer: Any, settings: GenerationConfig) -> int | None:
    """Some token; one row is never padded, but its absence is warned of."""
    if tokenizer.pad_token_id is not None:
        return tokenizer.pad_token_id
    end: Any = settings.eos_token_id
    return end[0] if isinstance(end, list) else end
