"""`memorizing demo`."""

from __future__ import annotations

from typing import Annotated

import typer

from memorizing.cli.output import JsonOption, prepare_file, write_result

EXAMPLES = """\b
examples:
  memorizing demo
  memorizing demo --seed 1
  memorizing demo --steps-factor 4 --json demo.json
"""


def run(
    seed: Annotated[
        int, typer.Option(min=0, help="Initial weights and order of the documents.")
    ] = 0,
    steps_factor: Annotated[
        float, typer.Option(min=0.0, help="Train this many times as long.")
    ] = 1.0,
    json_file: JsonOption = None,
) -> None:
    """Train two small models, with memory and without, and compare them on unseen source code."""
    prepare_file(json_file)

    from memorizing.demo import run_demo

    result = run_demo(seed=seed, steps_factor=steps_factor)
    write_result(json_file, result)
