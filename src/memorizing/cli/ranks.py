"""Verbs in several processes, which `torchrun` or `accelerate launch` started."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import TYPE_CHECKING

import typer

from memorizing.errors import ConfigError, MemorizingError

if TYPE_CHECKING:
    from memorizing.ranks import Ranks

VERBS = ("train", "finetune", "evaluate")
"""Those that processes do together."""

_USAGE_STATUS = 2


@contextlib.contextmanager
def join_launched(device: str = "auto") -> Iterator[Ranks]:
    """Work as one with the launcher's other processes; only the main one shows what it does.

    Args:
        device: of `--device`.

    Raises:
        typer.Exit: an error that the main process tells.
        MemorizingError: see `join_ranks`.
    """
    from memorizing.ranks import ALONE, find_world, join_ranks

    if find_world() == 1:
        yield ALONE
        return
    ranks = ALONE
    try:
        with join_ranks(None if device == "auto" else device) as ranks, _stay_silent(ranks):
            yield ranks
    except MemorizingError as error:
        if ranks.is_told:
            raise typer.Exit(_USAGE_STATUS) from error
        raise


@contextlib.contextmanager
def _stay_silent(ranks: Ranks) -> Iterator[None]:
    if ranks.is_main:
        yield
        return
    with (
        open(os.devnull, "w", encoding="utf-8") as nowhere,
        contextlib.redirect_stdout(nowhere),
        contextlib.redirect_stderr(nowhere),
    ):
        yield


def check_verb(name: str | None) -> None:
    """Refuse verbs that several processes would do several times.

    Raises:
        ConfigError: with the verbs that they share.
    """
    words = os.environ.get("WORLD_SIZE", "1")
    is_launched = words.isdecimal() and int(words) > 1 and "RANK" in os.environ
    if is_launched and name is not None and name not in VERBS:
        raise ConfigError(
            f"{name} was started in {words} processes, and works in one; start it without torchrun "
            f"(in several work {', '.join(VERBS)})"
        )
