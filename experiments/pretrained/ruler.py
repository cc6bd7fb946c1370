"""RULER's tasks that need no download, by lm-eval: nothing, the native context, and a memory.

    python experiments/pretrained/convert.py
    pip install 'lm-eval[ruler]'
    python experiments/pretrained/ruler.py                       # goes on where it stopped
    python experiments/pretrained/ruler.py --lengths 4096 --arms passages --tasks niah_single_1

Needles among repeated sentences and among other needles, chains of variables, common and frequent
words; the first `--samples` of each task at each length. Every arm answers the same prompts,
greedily; a score is the mean share of expected strings that stand in the answer, as RULER counts.

- `window`: the model sees its last `--window` tokens;
- `native`: it sees the whole prompt, as far as it was trained to;
- `entries`: the paper's way: heads of layer `--layer` mix in single entries of the prompt's earlier
  tokens;
- `passages`: what `add_memory(model)` does.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from command_line import add_precision_option, make_parser, run_command
from rich.console import Console
from rich.table import Table
from smollm import CONTEXT_LEN, PRECISIONS

from memorizing.benchmark.preparing import describe_machine
from memorizing.errors import IndexUnavailableError
from memorizing.huggingface.loading import load_pretrained
from memorizing.metrics import bootstrap_ratio
from memorizing.storage.files import write_json

RESULTS = Path("experiments/results/pretrained_ruler.json")
LENGTHS = (4096, 8192, 16_384, 32_768)
"""Tokens of a prompt and its answer."""
TASKS = (
    "niah_single_1",
    "niah_multikey_2",
    "niah_multikey_3",
    "ruler_vt",
    "ruler_cwe",
    "ruler_fwe",
)
ARMS = ("window", "native", "entries", "passages")


def main() -> int:
    """Measure what is not measured yet, print, and write the JSON."""
    parser = make_parser(__doc__)
    add_precision_option(parser)
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--lengths", nargs="+", type=int, default=list(LENGTHS))
    parser.add_argument("--samples", type=int, default=20, help="of each task and length")
    parser.add_argument("--native", type=int, default=CONTEXT_LEN, help="the model's context")
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--layer", type=int, default=20, help="of entries")
    parser.add_argument("--json", type=Path, default=RESULTS)
    return run_command(measure, parser.parse_args())


def measure(options: argparse.Namespace) -> None:
    """Every cell that the JSON has not; it is written after each."""
    about = {
        "model": options.model.name,
        "samples": options.samples,
        "window": options.window,
        "layer": options.layer,
        "precision": options.precision,
    }
    kept = json.loads(options.json.read_text()) if options.json.is_file() else {}
    cells = kept.get("cells", []) if {k: kept.get(k) for k in about} == about else []
    done = {(cell["length"], cell["task"], cell["arm"]) for cell in cells}
    for length in sorted(options.lengths):
        for arm in options.arms:
            tasks = [task for task in options.tasks if (length, task, arm) not in done]
            if not tasks or (arm == "native" and length > options.native):
                continue
            model = make_model(options, arm)
            for task in tasks:
                cells.append(measure_cell(options, model, length, task, arm))
                values = {
                    **about,
                    "command": shlex.join(["python", *sys.argv]),
                    "cells": cells,
                    "machine": describe_machine(),
                }
                write_json(options.json, values)
    show(cells)


def measure_cell(
    options: argparse.Namespace, model: Any, length: int, task: str, arm: str
) -> dict[str, Any]:
    """One task at one length by the model of one arm: the share of each sample."""
    try:
        import lm_eval
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise IndexUnavailableError(
            "RULER's tasks need lm-eval with its extra; pip install 'lm-eval[ruler]'"
        ) from error

    start_s = time.monotonic()
    evaluate: Any = lm_eval.simple_evaluate
    metadata: Any = {"max_seq_lengths": [length], "pretrained": str(options.model)}
    found = evaluate(
        model=model,
        tasks=[task],
        limit=options.samples,
        log_samples=True,
        bootstrap_iters=0,
        task_manager=TaskManager(metadata=metadata),
    )
    (samples,) = found["samples"].values()
    shares = [float(sample[str(length)]) for sample in samples]
    low, high = bootstrap_ratio(np.array(shares), np.ones(len(shares)), [1] * len(shares))
    cell = {
        "length": length,
        "task": task,
        "arm": arm,
        "share": float(np.mean(shares)),
        "low": low,
        "high": high,
        "shares": shares,
        "answers": [sample["resps"][0][0][:200] for sample in samples],
        "seconds": round(time.monotonic() - start_s),
    }
    print(length, task, arm, f"{cell['share']:.0%}", f"{cell['seconds']} s", flush=True)
    return cell


def make_model(options: argparse.Namespace, arm: str) -> Any:
    """What lm-eval asks, for all tasks: no request sees what another read."""
    import lm_eval.models.huggingface

    from memorizing.huggingface.lm_eval import MemorizingLM

    model, tokenizer = load_pretrained(str(options.model), dtype=PRECISIONS[options.precision])
    if arm == "native":
        plain: Any = lm_eval.models.huggingface.HFLM
        return plain(model, tokenizer=tokenizer, max_length=options.native)
    if arm == "entries":
        return MemorizingLM(
            model, tokenizer=tokenizer, read="entries", layers=options.layer, window=options.window
        )
    return MemorizingLM(model, tokenizer=tokenizer, memory=arm == "passages", window=options.window)


def show(cells: list[dict[str, Any]]) -> None:
    """A line for each length and task, a column for each arm."""
    table = Table("tokens", "task", *ARMS)
    by_place = {(cell["length"], cell["task"], cell["arm"]): cell for cell in cells}
    for length, task in dict.fromkeys((cell["length"], cell["task"]) for cell in cells):
        row = [by_place.get((length, task, arm)) for arm in ARMS]
        table.add_row(f"{length:,}", task, *("" if c is None else f"{c['share']:.0%}" for c in row))
    Console().print(table)


if __name__ == "__main__":
    raise SystemExit(main())
