"""`memorizing finetune`."""

from __future__ import annotations

import dataclasses
import math
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from memorizing.cli.evaluate import Precision
from memorizing.cli.output import (
    INTERRUPTED_STATUS,
    JsonOption,
    parse_numbers,
    prepare_file,
    say,
    show_progress,
    write_result,
)
from memorizing.cli.pretrained import DeviceOption, ModelArgument, PrecisionOption, load_model
from memorizing.errors import ConfigError

EXAMPLES = """\b
examples:
  memorizing finetune runs/smollm2 --corpus files:books --out runs/books
  memorizing finetune runs/smollm2 --corpus files:books --out runs/control --capacity 0
  memorizing finetune runs/smollm2 --corpus python:torch --out runs/torch --layers 20 \\
      --train gates --held-out 'torch/nn/*' --set memory.combine=gate
  memorizing finetune runs/smollm2 --corpus files:books --out runs/books --resume
"""


class Train(StrEnum):
    """What is trained."""

    GATES = "gates"
    LORA = "lora"
    ALL = "all"


def run(
    model: ModelArgument,
    corpus: Annotated[
        str,
        typer.Option(metavar="KIND:WHERE", help="What is read (`memorizing info corpora`)."),
    ],
    out: Annotated[
        Path,
        typer.Option("--out", metavar="RUN", help="Folder of the run: all it writes is there."),
    ],
    train: Annotated[
        Train,
        typer.Option(
            help="Gates and scales only; these and LoRA (needs peft); or these and all weights."
        ),
    ] = Train.LORA,
    layers: Annotated[
        str | None,
        typer.Option(
            metavar="N,N,...",
            help="Layers that read the memory, from 0. Default: one, at 3/5 of the depth.",
        ),
    ] = None,
    calibrate: Annotated[
        bool,
        typer.Option(
            "--calibrate", help="Find layers and heads that gain by a memory before any training."
        ),
    ] = False,
    window: Annotated[
        int, typer.Option(min=1, metavar="N", help="Tokens that local attention sees.")
    ] = 512,
    capacity: Annotated[
        int,
        typer.Option(
            min=0, metavar="N", help="Entries of each document's memory; 0 trains without memory."
        ),
    ] = 8192,
    steps: Annotated[int, typer.Option(min=1, metavar="N", help="Steps of training.")] = 500,
    rows: Annotated[
        int,
        typer.Option(
            min=1, metavar="N", help="Documents side by side; a step reads a segment of each."
        ),
    ] = 2,
    rate: Annotated[
        float,
        typer.Option(
            metavar="X", help="Learning rate. 0 means 3e-4 for LoRA, 3e-5 for all weights."
        ),
    ] = 0.0,
    gate_rate: Annotated[
        float, typer.Option(metavar="X", help="Learning rate of gates and scales.")
    ] = 1e-2,
    lora_rank: Annotated[int, typer.Option(min=1, metavar="N", help="Rank of LoRA.")] = 16,
    held_out: Annotated[
        str | None,
        typer.Option(
            metavar="NAMES",
            help="Documents to evaluate on while training: names or shell patterns, with commas.",
        ),
    ] = None,
    evaluate_every: Annotated[
        int | None,
        typer.Option(
            min=0,
            metavar="N",
            help="Steps between evaluations, with memory and without. Default: 100, where "
            "documents are held out.",
        ),
    ] = None,
    precision: PrecisionOption = Precision.AUTO,
    device: DeviceOption = "auto",
    seed: Annotated[int, typer.Option(min=0, metavar="N", help="Order of documents, LoRA.")] = 0,
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="KEY=VALUE",
            help="Any other setting, as memory.combine=gate, finetune.clip_norm=0 or "
            "data.min_document_tokens=4096. Repeatable.",
        ),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue the run in RUN from its last checkpoint.")
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace a run that is in RUN.")
    ] = False,
    json_file: JsonOption = None,
) -> None:
    """Finetune a model of transformers to use a memory: gates, LoRA, or all weights.

    Documents are read in order, side by side, each with a memory of its own. What was learned is
    saved by itself in RUN/adapter. Ctrl-C saves and ends with status 130; --resume, with the same
    options, continues bit for bit.
    """
    tables = parse_settings(settings or [])
    if calibrate and (layers is not None or not capacity):
        raise ConfigError(
            "--calibrate finds layers that read a memory: leave out --layers, and give a capacity"
        )
    chosen_layers = None if layers is None else parse_numbers(layers, "--layers")
    data = {"corpus": corpus, "validation": held_out or "", **tables["data"]}
    wants_evaluation = bool(held_out or data.get("held_out_share"))
    if evaluate_every is None:
        evaluate_every = 100 if wants_evaluation else 0
    values = {
        "train": train.value,
        "steps": steps,
        "rows": rows,
        "learning_rate": rate,
        "gate_learning_rate": gate_rate,
        "lora_rank": lora_rank,
        "evaluate_every": evaluate_every,
        "seed": seed,
        **tables["finetune"],
    }
    memory = {"window": window, "capacity": capacity, **tables["memory"]}
    prepare_file(json_file)

    from memorizing.config import DataConfig
    from memorizing.settings import build_dataclass
    from memorizing.training.finetuning import FinetuneSettings

    tuning = build_dataclass(FinetuneSettings, values, "finetune.")
    reading = build_dataclass(DataConfig, data, "data.")
    tuning = dataclasses.replace(
        tuning,
        min_document_tokens=reading.min_document_tokens or tuning.min_document_tokens,
        max_document_tokens=reading.max_document_tokens or tuning.max_document_tokens,
    )

    from memorizing.data import load_splits
    from memorizing.huggingface import MemorySettings, add_memory
    from memorizing.huggingface.learning.calibration import add_calibrated_memory
    from memorizing.training import finetune

    # Refused before anything is loaded.
    MemorySettings.from_dict({"layers": chosen_layers or [0], "segment_len": window, **memory})
    loaded, tokenizer = load_model(model, precision, device)
    splits = load_splits(reading)
    for line in splits.describe():
        say(line)
    if not calibrate:
        add_memory(loaded, chosen_layers, **memory)
    elif resume:
        restore_memory(loaded, out)
    else:
        say("calibrating on the beginning of the corpus, which is read several times")
        with show_progress("calibrating") as advance:
            texts = (document.text for document in splits.train)
            found = add_calibrated_memory(loaded, tokenizer, texts, progress=advance, **memory)
        say(f"calibrated: {found}")
    result = finetune(
        loaded,
        tokenizer,
        splits.train,
        tuning,
        out,
        validation=splits.validation if tuning.evaluate_every else (),
        resume=resume,
        overwrite=overwrite,
        about={"model": model, "data": dataclasses.asdict(reading)},
    )
    done = "stopped" if result.interrupted else "finetuned"
    print(
        f"{done} after {result.steps:,} steps, {result.tokens:,} tokens, {result.seconds:,.0f} s; "
        f"training perplexity {math.exp(result.train_nats):.3f}"
        + (
            ""
            if result.validation_nats is None
            else f", validation perplexity {math.exp(result.validation_nats):.3f}"
        )
    )
    print(f"run folder: {out}")
    write_result(json_file, {**dataclasses.asdict(result), "run_dir": str(out)})
    if result.interrupted:
        say("to go on: the same command with --resume")
        raise typer.Exit(INTERRUPTED_STATUS)
    print(f"adapter: {out / 'adapter'}")


def restore_memory(model: Any, run_dir: Path) -> None:
    """Give a model the memory that a run began with. In place."""
    from memorizing.huggingface import add_memory
    from memorizing.huggingface.attaching.attachment import get_attachment, parse_heads
    from memorizing.training.finetuning.run import read_description

    description = read_description(run_dir)
    add_memory(model, **description["memory"])
    get_attachment(model).load_heads(parse_heads(description["heads"]), str(run_dir))


def parse_settings(settings: list[str]) -> dict[str, dict[str, Any]]:
    """`memory.KEY=VALUE`, `finetune.KEY=VALUE` and `data.KEY=VALUE` as three tables.

    Raises:
        ConfigError: another table, or no value.
    """
    from memorizing.settings import parse_value

    tables: dict[str, dict[str, Any]] = {"memory": {}, "finetune": {}, "data": {}}
    for setting in settings:
        name, equals, text = setting.partition("=")
        table, dot, key = name.strip().partition(".")
        if not equals or not dot or table not in tables:
            raise ConfigError(
                f"--set is {setting!r}; write TABLE.KEY=VALUE with a table of "
                f"{', '.join(tables)}, such as memory.combine=gate"
            )
        tables[table][key] = parse_value(text)
    return tables
