"""What the verbs share that run a model of `transformers`: options, loading, memory folders."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from memorizing.cli.evaluate import Precision
from memorizing.cli.output import say
from memorizing.errors import ConfigError

if TYPE_CHECKING:
    from memorizing.memory.disk import MemoryFolder

ModelArgument = Annotated[
    str,
    typer.Argument(
        metavar="MODEL", help="Folder of a model of transformers, or its name on the hub."
    ),
]
PrecisionOption = Annotated[
    Precision,
    typer.Option(help="Of the model. auto is as it was saved, on a CPU what is faster here."),
]
DeviceOption = Annotated[
    str, typer.Option(metavar="DEVICE", help="cpu, cuda, cuda:1; auto is cuda where there is one.")
]
AdapterOption = Annotated[
    Path | None,
    typer.Option(
        "--adapter", metavar="DIR", help="What `memorizing finetune` learned for this model."
    ),
]

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
    if precision != Precision.AUTO or place.type == "cpu":
        dtype = choose_precision(precision.value, _PROBE_DIM, 4 * _PROBE_DIM, place).dtype
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


def open_folder(path: Path) -> MemoryFolder | None:
    """The memory in a folder; None where one may be made.

    Raises:
        MemoryFolderError: it holds something else, or is damaged.
    """
    from memorizing.memory.disk import MemoryFolder

    return MemoryFolder.find(path)


def show_name(name: str) -> str:
    """A document's name on one line, without what would steer the terminal."""
    return name if name.isprintable() else repr(name)


def count_bytes(path: Path) -> int:
    """Of all files in a folder."""
    return sum(file.lstat().st_size for file in path.rglob("*") if file.is_file())


def describe_bytes(num_bytes: int) -> str:
    """As people say it: 83.2 MiB."""
    size, units = float(num_bytes), ["bytes", "KiB", "MiB", "GiB"]
    while size >= 1024 and len(units) > 1:
        size, units = size / 1024, units[1:]
    return f"{size:,.0f} {units[0]}" if units[0] == "bytes" else f"{size:,.1f} {units[0]}"
