"""What the verbs share: options, statuses, and the files they write."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from memorizing.errors import ConfigError, IndexUnavailableError
from memorizing.storage.files import check_output, encode_json, write_output
from memorizing.terminal import say

INTERRUPTED_STATUS = 130
"""Exit status after Ctrl-C, as shells have it."""


Precision = Literal["auto", "fp32", "bf16"]
"""Dtype of products and activations."""


def option(metavar: str, help_text: str, *names: str, **limits: Any) -> Any:
    """An option that takes a value; without names it is called as its argument is."""
    return typer.Option(*names, metavar=metavar, help=help_text, **limits)


def flag(help_text: str, *names: str, **limits: Any) -> Any:
    """An option that is set or not, or one whose values typer lists itself."""
    return typer.Option(*names, help=help_text, **limits)


JsonOption = Annotated[Path | None, option("FILE", "Also write the result as JSON.", "--json")]
RunArgument = Annotated[
    Path, typer.Argument(metavar="RUN", help="Folder of a run (or, with --corpus, a checkpoint).")
]
CorpusOption = Annotated[
    str | None, option("KIND:WHERE", "Read another corpus (`memorizing info corpora`).")
]
TextColumnOption = Annotated[
    str, option("NAME", "Where jsonl: and parquet: corpora have the text.")
]
ProbedPrecisionOption = Annotated[Precision, flag("auto asks a short probe of this machine.")]
ResumeOption = Annotated[
    bool, flag("Continue the run in that folder from its last checkpoint.", "--resume")
]
OverwriteOption = Annotated[bool, flag("Replace a run that is in that folder.", "--overwrite")]
LayersOption = Annotated[
    str | None,
    option(
        "N,N,...",
        "Layers that read the memory, from 0. Default: one, at 3/5 of the depth.",
    ),
]
HeadsOption = Annotated[
    list[str] | None,
    option(
        "LAYER:N,N,...",
        "Heads of a layer that read the memory, as 18:6,7. Default: all. Repeatable.",
        "--heads",
    ),
]
ModelArgument = Annotated[
    str,
    typer.Argument(
        metavar="MODEL", help="Folder of a model of transformers, or its name on the hub."
    ),
]
ModelPrecisionOption = Annotated[
    Precision, flag("Of the model. auto is as it was saved, on a CPU what is faster here.")
]
DeviceOption = Annotated[
    str, option("DEVICE", "cpu, cuda, cuda:1; auto is cuda where there is one.")
]
DocumentsOption = Annotated[
    list[str] | None,
    option(
        "PATTERN",
        "Search only documents of --memory whose names match: * is anything, / too. Repeatable.",
        "--documents",
    ),
]
AdapterOption = Annotated[
    Path | None, option("DIR", "What `memorizing finetune` learned for this model.", "--adapter")
]


def set_option(help_text: str) -> Any:
    """`--set KEY=VALUE`, with what is set in this verb."""
    return option("KEY=VALUE", f"{help_text} Repeatable.", "--set")


def prepare_files(*paths: Path | None, plot: Path | None = None) -> None:
    """Make sure that what is written at the end can be, so that no long run ends in an error.

    Args:
        paths: where files will be written; their folders are made.
        plot: where a picture, or a page with charts, will be.

    Raises:
        ResourceError: a path is a folder, or cannot be written.
        IndexUnavailableError: matplotlib is not installed.
    """
    for path in filter(None, (*paths, plot)):
        check_output(path)
    if plot is not None:
        try:
            import matplotlib  # noqa: F401
        except ImportError as error:
            raise IndexUnavailableError(
                'charts need matplotlib, which is not installed; pip install "memorizing[plots]"'
            ) from error


def write_result(path: Path | None, values: Mapping[str, Any]) -> None:
    """Write what a verb reports where `--json` says, and say so.

    Raises:
        ResourceError: the file cannot be written.
    """
    if path is not None:
        write_output(path, encode_json(values))
        say(f"written: {path}")


def parse_numbers(text: str, option: str) -> list[int]:
    """Whole numbers with commas between them; `8_192` is allowed.

    Raises:
        ConfigError: anything else, or a negative number.
    """
    try:
        numbers = [int(part) for part in text.split(",")]
    except ValueError:
        numbers = []
    if not numbers or min(numbers) < 0:
        example = "whole numbers from 0 on with commas between, such as 0,512,8192"
        raise ConfigError(f"{option} is {text!r}; allowed: {example}")
    return numbers


def parse_heads(texts: Sequence[str] | None) -> dict[int, list[int]] | None:
    """What `--heads` was given: heads by layer; None of nothing.

    Raises:
        ConfigError: what is no layer with heads, or a layer twice.
    """
    heads: dict[int, list[int]] = {}
    for text in texts or ():
        layer, colon, numbers = text.partition(":")
        if not colon or not layer.strip().isdecimal():
            raise ConfigError(f"--heads is {text!r}; write a layer and its heads, such as 18:6,7")
        if int(layer) in heads:
            raise ConfigError(f"--heads has layer {int(layer)} twice; write all its heads at once")
        heads[int(layer)] = parse_numbers(numbers, "--heads")
    return heads or None


def parse_settings(
    settings: Sequence[str] | None, form: str, tables: Collection[str] = ()
) -> dict[str, Any]:
    """What `--set` was given, by key; values as in TOML.

    Args:
        settings: KEY=VALUE.
        form: how they are written, for the message.
        tables: where there are any, keys are TABLE.KEY of one of these.

    Raises:
        ConfigError: anything else.
    """
    from memorizing.settings import parse_value

    values: dict[str, Any] = {}
    for text in settings or ():
        key, equals, value = (part.strip() for part in text.partition("="))
        table, dot, _ = key.partition(".")
        if not equals or (tables and not (dot and table in tables)):
            raise ConfigError(f"--set is {text!r}; write {form}")
        values[key] = parse_value(value)
    return values
