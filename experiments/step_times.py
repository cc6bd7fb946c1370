"""How long a training step of each arm takes, beside the others, on an otherwise idle machine.

    python experiments/step_times.py

"At equal time" needs times that were measured alike: the arms take turns, step by step, after their
memories are full, and what counts is the median of the ratios to the first arm of the same turn.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from memorizing.benchmark.preparing import describe_machine
from memorizing.benchmark.timing import time_interleaved
from memorizing.config import load_config
from memorizing.data import SegmentLoader
from memorizing.model import MemorizingTransformer
from memorizing.storage.files import write_json
from memorizing.training import Trainer, make_display, prepare_corpus

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE / "queue"))

from plan import NO_MEMORY, PAPER, TABLE_4  # noqa: E402

ARMS: dict[str, tuple[str, ...]] = {
    "cache": NO_MEMORY,
    "memory": (),
    "paper-cache": (*PAPER, *NO_MEMORY),
    "paper-memory": PAPER,
    "smear": ("model.conv_len=0", "model.smear_keys=true"),
    "context-2048-cache": TABLE_4["2048-xl"],
    "window-1024": ("model.window=1024", *NO_MEMORY),
    "window-2048": ("model.window=2048", *NO_MEMORY),
    "crossbatch-1": (
        "training.rows=4",
        "training.crossbatch_segments=1",
        "training.crossbatch_rows=1",
    ),
    "crossbatch-4": (
        "training.rows=4",
        "training.crossbatch_segments=1",
        "training.crossbatch_rows=4",
    ),
}


def main() -> None:
    """Time, print, and write the JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--family", default="proofs")
    parser.add_argument("--turns", type=int, default=12)
    parser.add_argument("--fill", type=int, default=20, help="steps before, which fill memories")
    parser.add_argument("--json", type=Path, default=HERE / "results" / "step_times.json")
    arguments = parser.parse_args()
    base = load_config(str(HERE / "recipes" / f"{arguments.family}.toml"))
    corpus = prepare_corpus(base, make_display(False))
    trainers: dict[str, Trainer] = {}
    for name, settings in ARMS.items():
        config = base.replace(["training.evaluate_every=0", *settings])
        torch.manual_seed(0)
        loader = SegmentLoader(
            corpus.train,
            config.training.rows,
            config.model.segment_len,
            corpus.tokenizer.start_token,
            seed=0,
            repeat=True,
        )
        trainers[name] = Trainer(MemorizingTransformer(config.model), loader, config.training)
        trainers[name].run(arguments.fill)

    def make_step(trainer: Trainer):
        return lambda: trainer.run(trainer.step + 1)

    steps = {name: make_step(trainer) for name, trainer in trainers.items()}
    timings = time_interleaved(steps, num_pairs=arguments.turns, num_warmup=2)
    rows = [timings.compare(name, "cache") for name in ARMS]
    table = Table("arm", "seconds a step", "times cache only")
    for row in rows:
        table.add_row(row["name"], f"{row['seconds']:.3f}", f"{row['ratio']:.3f}")
    Console().print(table)
    values = {"tokens_per_step": 4096, "rows": rows, "machine": describe_machine()}
    write_json(arguments.json, values)


if __name__ == "__main__":
    main()
