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

MAX_STEPS_FACTOR = 1000

EXAMPLES = """\b
examples:
  memorizing demo
  memorizing demo --seed 1
  memorizing demo --steps-factor 4 --json demo.json
"""


def run(
    seed: Annotated[int, flag("Initial weights and order of the documents.", min=0)] = 0,
    steps_factor: Annotated[float, option("FACTOR", "Train this many times as long.")] = 1.0,
    run_dir: Annotated[Path, option("DIR", "Folder that it writes, and replaces.", "--run")] = Path(
        "runs/demo"
    ),
    json_file: JsonOption = None,
) -> None:
    """Train two small models, with memory and without, and compare them on unseen source code.

    The folder also holds the result as result.json. Ctrl-C ends it with status 130.
    """
    if not 0.0 < steps_factor < MAX_STEPS_FACTOR:
        allowed = f"above 0 and below {MAX_STEPS_FACTOR:,}; 1 is the demo as it is"
        raise ConfigError(f"--steps-factor is {steps_factor}; allowed: {allowed}")
    prepare_files(json_file)

    from memorizing.demo import run_demo

    result = run_demo(seed=seed, steps_factor=steps_factor, run_dir=run_dir)
    if not result:
        raise typer.Exit(INTERRUPTED_STATUS)
    write_result(json_file, result)
