"""`memorizing train`."""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from memorizing.cli.options import (
    INTERRUPTED_STATUS,
    JsonOption,
    OverwriteOption,
    ResumeOption,
    option,
    prepare_files,
    set_option,
    write_result,
)
from memorizing.cli.ranks import join_launched
from memorizing.terminal import say, show

if TYPE_CHECKING:
    from memorizing.ranks import Ranks
    from memorizing.training import TrainingResult

EXAMPLES = """\b
examples:
  memorizing train small --run runs/small
  memorizing train small --run runs/cache_only --set model.capacity=0
  memorizing train small --run runs/mine --set data.corpus=files:texts \\
      --set data.validation= --set data.test= --set data.held_out_share=0.2
  memorizing train mine.toml --run runs/mine
  memorizing train small --run runs/small --resume
  torchrun --nproc-per-node 2 -m -- memorizing train small --run runs/small
"""


def run(
    recipe: Annotated[
        str,
        typer.Argument(
            metavar="RECIPE",
            help="Name of a recipe (see `memorizing info recipes`), or a TOML file.",
        ),
    ],
    run_dir: Annotated[Path, option("DIR", "Folder of the run: all it writes is there.", "--run")],
    settings: Annotated[
        list[str] | None, set_option("Change a setting, as model.num_layers=4.")
    ] = None,
    resume: ResumeOption = False,
    overwrite: OverwriteOption = False,
    json_file: JsonOption = None,
) -> None:
    """Train a model by a recipe.

    Ctrl-C saves and ends with status 130; --resume continues bit for bit. Processes that torchrun
    or accelerate launch start train one model.
    """
    from memorizing.config import load_config

    with join_launched() as ranks:
        config = load_config(recipe).replace(settings or [])
        prepare_files(json_file if ranks.is_main else None)

        from memorizing.training import train

        result = train(config, run_dir, resume=resume, overwrite=overwrite)
    resuming = describe_resuming(recipe, run_dir, settings or [])
    report_training(result, "trained", run_dir, json_file, resuming, ranks)


def report_training(
    result: TrainingResult,
    done: str,
    run_dir: Path,
    json_file: Path | None,
    resuming: str,
    ranks: Ranks,
) -> None:
    """Print what a training did, and where; write it as JSON where that is wanted.

    Of several processes the main one does.

    Args:
        result: of the training.
        done: what it is called when it was not stopped.
        run_dir: its folder.
        json_file: of `--json`.
        resuming: how to go on where it was stopped.
        ranks: the processes that trained.

    Raises:
        typer.Exit: it was stopped.
    """
    if ranks.is_main:
        _report(result, done, run_dir, json_file, resuming)
    if result.interrupted:
        raise typer.Exit(INTERRUPTED_STATUS)


def _report(
    result: TrainingResult, done: str, run_dir: Path, json_file: Path | None, resuming: str
) -> None:
    from memorizing.metrics import compute_perplexity

    validation = ""
    if result.validation_nats is not None:
        validation = f", validation perplexity {compute_perplexity(result.validation_nats):.3f}"
    show(
        f"{'stopped' if result.interrupted else done} after {result.steps:,} steps, "
        f"{result.tokens:,} tokens, {result.seconds:,.0f} s; "
        f"training perplexity {compute_perplexity(result.train_nats):.3f}{validation}"
    )
    show(f"run folder: {run_dir}")
    write_result(json_file, {**dataclasses.asdict(result), "run_dir": str(run_dir)})
    if result.interrupted:
        say(f"to go on: {resuming}")


def describe_resuming(recipe: str, run_dir: Path, settings: Sequence[str]) -> str:
    """The command that continues a run: with its settings, which a run resumes with."""
    words = ["memorizing", "train", recipe, "--run", str(run_dir)]
    words += [word for setting in settings for word in ("--set", setting)]
    return shlex.join([*words, "--resume"])
