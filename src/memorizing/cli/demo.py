"""`memorizing demo`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from memorizing.cli.options import (
    INTERRUPTED_STATUS,
    JsonOption,
    flag,
    option,
    prepare_files,
    write_result,
)
from memorizing.errors import ConfigError

MAX_MINUTES = 10_000

EXAMPLES = """\b
examples:
  memorizing demo
  memorizing demo --seed 1
  memorizing demo --minutes 30 --json demo.json
  memorizing demo --minutes 0            the whole recipe, however long it takes
"""


def run(
    seed: Annotated[int, flag("Initial weights and order of the documents.", min=0)] = 0,
    minutes: Annotated[
        float,
        option("N", "Train and evaluate as much of the recipe as ends by then; 0 is all of it."),
    ] = 10.0,
    recipe: Annotated[
        str,
        option("NAME|FILE", "Another recipe; memory/config.toml of a demo's folder repeats it."),
    ] = "demo",
    run_dir: Annotated[Path, option("DIR", "Folder that it writes, and replaces.", "--run")] = Path(
        "runs/demo"
    ),
    json_file: JsonOption = None,
) -> None:
    """Train two small models, with memory and without, and compare them on unseen source code.

    The folder also holds the result as result.json. Ctrl-C ends it with status 130.
    """
    if not 0.0 <= minutes < MAX_MINUTES:
        allowed = f"0 (the whole recipe), and up to {MAX_MINUTES:,}"
        raise ConfigError(f"--minutes is {minutes}; allowed: {allowed}")
    prepare_files(json_file)

    from memorizing.demo import run_demo

    result = run_demo(seed=seed, minutes=minutes, recipe=recipe, run_dir=run_dir)
    if not result:
        raise typer.Exit(INTERRUPTED_STATUS)
    write_result(json_file, result)
