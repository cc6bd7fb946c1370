"""The attentions that the paper names as related work, each in the place of the model's own.

Each is a class derived from the library's `AttentionLayer`, in a file of its own; `naive.py` has
their formulas token by token. They take the settings of a model without memory, and their own:

    attention.kind=linformer attention.context=4096

The jobs `attentions/...` of the queue have such settings among theirs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

from attentions.compressive import Compressive
from attentions.linformer import Linformer
from attentions.performer import Performer, PerformerBeyond
from memorizing.config import ModelConfig
from memorizing.errors import ConfigError
from memorizing.model import MemorizingTransformer
from memorizing.model.block import AttentionLayer

KINDS: dict[str, type[AttentionLayer]] = {
    "linformer": Linformer,
    "performer": Performer,
    "performer-beyond": PerformerBeyond,
    "compressive": Compressive,
}
PREFIX = "attention."


def split_settings(settings: Sequence[str]) -> tuple[list[str], list[str]]:
    """Settings of the attention, and all others."""
    own = [setting for setting in settings if setting.startswith(PREFIX)]
    return own, [setting for setting in settings if setting not in own]


def choose_model(settings: Sequence[str]) -> Callable[[ModelConfig], MemorizingTransformer]:
    """What makes a model of the attention that settings name; the ordinary one where they do not.

    Raises:
        ConfigError: an attention that is not known, or settings without one. From what is returned,
            a memory, which these attentions do not read.
    """
    own, _ = split_settings(settings)
    values = dict(setting.removeprefix(PREFIX).split("=") for setting in own)
    kind = values.pop("kind", None)
    if kind is None and not values:
        return MemorizingTransformer
    if kind not in KINDS:
        raise ConfigError(f"{PREFIX}kind is {kind!r}; allowed: {', '.join(KINDS)}")
    numbers: dict[str, int] = {name: int(value) for name, value in values.items()}
    make_attention = partial(KINDS[kind], **numbers)

    def make(config: ModelConfig) -> MemorizingTransformer:
        if config.capacity:
            raise ConfigError(
                f"model.capacity is {config.capacity}, and {kind} reads no memory; set it to 0"
            )
        return MemorizingTransformer(config, make_attention)

    return make
