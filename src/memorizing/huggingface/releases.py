"""What differs between the releases of `transformers` that work."""

from __future__ import annotations

import dataclasses
from typing import Any

from transformers.modeling_outputs import CausalLMOutputWithPast

from memorizing.errors import ConfigError

_OLD_NAME = "past_key_values"
CACHE_NAME = (
    "cache"
    if any(field.name == "cache" for field in dataclasses.fields(CausalLMOutputWithPast))
    else _OLD_NAME
)
"""What a cache is called among arguments and in outputs: `cache` since 5.24."""


def take_cache(arguments: dict[str, Any]) -> Any:
    """The cache of a call, under whichever of its two names it is given; it is taken out. In place.

    Raises:
        ConfigError: it is given under both.
    """
    found = [
        cache for name in (_OLD_NAME, "cache") if (cache := arguments.pop(name, None)) is not None
    ]
    if len(found) > 1:
        raise ConfigError(
            "past_key_values and cache are two names of one history; give it once, as cache since "
            "transformers 5.24"
        )
    return found[0] if found else None
