"""`memorizing finetune`."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Any, Literal

from memorizing.cli.options import (
    DeviceOption,
    HeadsOption,
    JsonOption,
    LayersOption,
    ModelArgument,
    ModelPrecisionOption,
    OverwriteOption,
    ResumeOption,
    flag,
    option,
    parse_heads,
    parse_numbers,
    parse_settings,
    prepare_files,
    set_option,
)
from memorizing.cli.pretrained import calibrate_memory, load_model
from memorizing.cli.ranks import join_launched
from memorizing.cli.train import report_training
from memorizing.errors import ConfigError
from memorizing.terminal import say, show

EXAMPLES = """\b
examples:
  memorizing finetune runs/smollm2 --corpus files:books --out runs/books
  memorizing finetune runs/smollm2 --corpus files:src --read passages --out runs/passages
  memorizing finetune runs/smollm2 --corpus files:books --out runs/control --capacity 0
  memorizing finetune runs/smollm2 --corpus python:torch --out runs/torch --layers 20 \\
      --train gates --held-out 'torch/nn/*' --set memory.combine=gate
  memorizing finetune runs/smollm2 --corpus files:books --out runs/books --resume
  torchrun --nproc-per-node 2 -m memorizing finetune runs/smollm2 --corpus files:books \\
      --out runs/books
"""


def run(
    model: ModelArgument,
    corpus: Annotated[str, option("KIND:WHERE", "What is read (`memorizing info corpora`).")],
    out: Annotated[Path, option("RUN", "Folder of the run: all it writes is there.", "--out")],
    read: Annotated[
        Literal["entries", "passages"],
        flag("What the memory will be read as: single entries, or passages in front of a text."),
    ] = "entries",
    train: Annotated[
        Literal["gates", "lora", "all"],
        flag(
            "Gates and scales only; these and LoRA (needs peft); or these and all weights. "
            "Passages have no gates."
        ),
    ] = "lora",
    layers: LayersOption = None,
    heads: HeadsOption = None,
    calibrate: Annotated[
        bool,
        flag("Find layers and heads that gain by a memory before any training.", "--calibrate"),
    ] = False,
    window: Annotated[int, option("N", "Tokens that local attention sees.", min=1)] = 512,
    capacity: Annotated[
        int, option("N", "Entries of each document's memory; 0 trains without memory.", min=0)
    ] = 8192,
    steps: Annotated[int, option("N", "Steps of training.", min=1)] = 500,
    rows: Annotated[
        int | None,
        option(
            "N",
            "Documents side by side, a segment of each a step; with --read passages, texts a step. "
            "Default: 2, of texts 1.",
            min=1,
        ),
    ] = None,
    rate: Annotated[
        float, option("X", "Learning rate. 0 means 3e-4 for LoRA, 3e-5 for all weights.")
    ] = 0.0,
    gate_rate: Annotated[float, option("X", "Learning rate of gates and scales.")] = 1e-2,
    lora_rank: Annotated[int, option("N", "Rank of LoRA.", min=1)] = 16,
    held_out: Annotated[
        str | None,
        option(
            "NAMES",
            "Documents to evaluate on while training: names or shell patterns, with commas.",
        ),
    ] = None,
    evaluate_every: Annotated[
        int | None,
        option(
            "N",
            "Steps between evaluations, with memory and without. Default: 100, where documents "
            "are held out.",
            min=0,
        ),
    ] = None,
    precision: ModelPrecisionOption = "auto",
    device: DeviceOption = "auto",
    seed: Annotated[int, option("N", "Order of documents, LoRA.", min=0)] = 0,
    settings: Annotated[
        list[str] | None,
        set_option(
            "Any other setting, as memory.combine=gate, finetune.clip_norm=0 or "
            "data.min_document_tokens=4096."
        ),
    ] = None,
    resume: ResumeOption = False,
    overwrite: OverwriteOption = False,
    json_file: JsonOption = None,
) -> None:
    """Finetune a model of transformers to use a memory: gates, LoRA, or all weights.

    Documents are read in order, side by side, each with a memory of its own. With --read passages,
    texts of 64 to 128 tokens are read behind passages that their first words find, in half of them
    the text itself. What was learned is saved by itself in RUN/adapter. Ctrl-C saves and ends with
    status 130; --resume, with the same options, continues bit for bit.
    """
    tables: dict[str, dict[str, Any]] = {"memory": {}, "finetune": {}, "data": {}}
    form = f"TABLE.KEY=VALUE with a table of {', '.join(tables)}, such as memory.combine=gate"
    for name, value in parse_settings(settings, form, tables).items():
        table, _, key = name.partition(".")
        tables[table][key] = value
    if calibrate and (layers is not None or heads or not capacity):
        raise ConfigError(
            "--calibrate finds layers and heads that read a memory: leave out --layers and "
            "--heads, and give a capacity"
        )
    chosen_layers = None if layers is None else parse_numbers(layers, "--layers")
    chosen_heads = parse_heads(heads)
    memory = {"window": window, "capacity": capacity, "read": read, **tables["memory"]}
    data = {"corpus": corpus, "validation": held_out or "", **tables["data"]}
    wants_evaluation = bool(held_out or data.get("held_out_share"))
    if evaluate_every is None:
        evaluate_every = 100 if wants_evaluation else 0
    values = {
        "train": train,
        "steps": steps,
        "rows": rows or (1 if memory["read"] == "passages" else 2),
        "learning_rate": rate,
        "gate_learning_rate": gate_rate,
        "lora_rank": lora_rank,
        "evaluate_every": evaluate_every,
        "seed": seed,
        **tables["finetune"],
    }
    prepare_files(json_file)

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
    from memorizing.training import finetune

    # Refused before anything is loaded.
    tuning.check_memory(
        MemorySettings.from_dict({"layers": chosen_layers or [0], "segment_len": window, **memory})
    )
    with join_launched(device) as ranks:
        place = device if ranks.size == 1 else str(ranks.find_device())
        loaded, tokenizer = load_model(model, precision, place)
        splits = load_splits(reading)
        for line in splits.describe():
            say(line)
        if not calibrate:
            add_memory(loaded, chosen_layers, heads=chosen_heads, **memory)
        elif resume:
            restore_memory(loaded, out)
        else:
            texts = (document.text for document in splits.train)
            calibrate_memory(loaded, tokenizer, texts, "corpus", memory)
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
    resuming = "the same command with --resume"
    report_training(result, "finetuned", out, json_file, resuming, ranks)
    if ranks.is_main:
        show(f"adapter: {out / 'adapter'}")


def restore_memory(model: Any, run_dir: Path) -> None:
    """Give a model the memory that a run began with. In place."""
    from memorizing.huggingface import MemorySettings, add_memory
    from memorizing.huggingface.attaching.attachment import get_attachment, parse_heads
    from memorizing.training.finetuning.run import read_description

    description = read_description(run_dir)
    add_memory(model, **MemorySettings.from_dict(description["memory"]).to_dict())
    get_attachment(model).load_heads(parse_heads(description["heads"]), str(run_dir))
