"""What the verbs share that run a model of `transformers`."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from memorizing.cli.options import Precision
from memorizing.errors import ConfigError
from memorizing.terminal import say, show_progress

_PROBE_DIM = 128
"""Small: where a processor has no bf16, its products take a hundred times as long."""


def load_model(name: str, precision: Precision, device: str) -> tuple[Any, Any]:
    """A model and its tokenizer, and a line that says what was loaded.

    Raises:
        ConfigError: no such model or device.
        TokenizerError: no tokenizer that fits the model.
    """
    from memorizing.huggingface.loading import load_pretrained
    from memorizing.training.precision import choose_precision

    place = choose_device(device)
    dtype: Any = "auto"
    if precision != "auto" or place.type == "cpu":
        dtype = choose_precision(precision, _PROBE_DIM, 4 * _PROBE_DIM, place).dtype
    model, tokenizer = load_pretrained(name, dtype=dtype, device=place)
    num_weights = sum(weight.numel() for weight in model.parameters())
    kind = str(model.dtype).removeprefix("torch.")
    say(f"model: {name}, {type(model).__name__}, {num_weights:,} weights, {kind} on {place}")
    return model, tokenizer


def choose_device(name: str) -> Any:
    """The torch device of an option.

    Raises:
        ConfigError: it is not there.
    """
    import torch

    from memorizing.devices import find_device

    if name == "auto":
        return find_device()
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ConfigError(
            f"--device is {name!r}, which this machine does not have; allowed: auto, cpu, and what "
            "torch finds here"
        ) from error
    return device


def calibrate_memory(
    model: Any, tokenizer: Any, texts: Iterable[str], what: str, settings: dict[str, Any]
) -> None:
    """Give a model a memory in the layers and heads that suit it, and say which. In place.

    Raises:
        ConfigError: there are too few tokens, or no head gains or finds passages.
    """
    from memorizing.huggingface.learning.calibration import add_calibrated_memory

    say(f"calibrating on the beginning of the {what}")
    with show_progress("calibrating") as progress:
        found = add_calibrated_memory(model, tokenizer, texts, progress=progress, **settings)
    say(f"calibrated: {found}")


def describe_bytes(num_bytes: int) -> str:
    """As people say it: 83.2 MiB."""
    size, units = float(num_bytes), ["bytes", "KiB", "MiB", "GiB"]
    while size >= 1024 and len(units) > 1:
        size, units = size / 1024, units[1:]
    return f"{size:,.0f} {units[0]}" if units[0] == "bytes" else f"{size:,.1f} {units[0]}"
