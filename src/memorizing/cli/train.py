"""`memorizing train`."""

from __future__ import annotations

import dataclasses
import math
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from memorizing.cli.output import INTERRUPTED_STATUS, JsonOption, prepare_file, say, write_result

EXAMPLES = """\b
examples:
  memorizing train small --run runs/small
  memorizing train small --run runs/cache_only --set model.capacity=0
  memorizing train small --run runs/mine --set data.corpus=files:texts \\
      --set data.validation= --set data.test= --set data.held_out_share=0.2
  memorizing train mine.toml --run runs/mine
  memorizing train small --run runs/small --resume
"""


def run(
    recipe: Annotated[
        str,
        typer.Argument(
            metavar="RECIPE",
            help="Name of a recipe (see `memorizing info recipes`), or a TOML file.",
        ),
    ],
    run_dir: Annotated[
        Path,
        typer.Option("--run", metavar="DIR", help="Folder of the run: all it writes is there."),
    ],
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="KEY=VALUE",
            help="Change a setting, as model.num_layers=4. Repeatable.",
        ),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue the run in DIR from its last checkpoint.")
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace a run that is in DIR.")
    ] = False,
    json_file: JsonOption = None,
) -> None:
    """Train a model by a recipe.

    Ctrl-C saves and ends with status 130; --resume continues bit for bit.
    """
    from memorizing.config import load_config

    config = load_config(recipe).replace(settings or [])
    prepare_file(json_file)

    from memorizing.training import train

    result = train(config, run_dir, resume=resume, overwrite=overwrite)
    done = "stopped" if result.interrupted else "trained"
    print(
        f"{done} after {result.steps:,} steps, {result.tokens:,} tokens, {result.seconds:,.0f} s; "
        f"training perplexity {math.exp(result.train_nats):.3f}"
        + describe_validation(result.validation_nats)
    )
    print(f"run folder: {run_dir}")
    write_result(json_file, {**dataclasses.asdict(result), "run_dir": str(run_dir)})
    if result.interrupted:
        say(f"to go on: {describe_resuming(recipe, run_dir, settings or [])}")
        raise typer.Exit(INTERRUPTED_STATUS)


def describe_resuming(recipe: str, run_dir: Path, settings: Sequence[str]) -> str:
    """The command that continues a run: with its settings, which a run resumes with."""
    words = ["memorizing", "train", recipe, "--run", str(run_dir)]
    words += [word for setting in settings for word in ("--set", setting)]
    return shlex.join([*words, "--resume"])


def describe_validation(nats: float | None) -> str:
    """The end of the sentence on perplexity; empty where nothing was evaluated."""
    return "" if nats is None else f", validation perplexity {math.exp(nats):.3f}"
