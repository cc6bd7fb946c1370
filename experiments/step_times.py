"""How long a training step of each arm takes, beside the others, on an otherwise idle machine.

    python experiments/step_times.py
    python experiments/step_times.py --attentions   # the arms of the jobs `attentions/`

"At equal time" needs times that were measured alike: the arms take turns, step by step, after their
memories are full, and what counts is the median of the ratios to the first arm of the same turn.
Beside it stand the weights of an arm, and the bytes that its state takes for a document.
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
from memorizing.model import MemorizingTransformer, evaluation_mode
from memorizing.storage.files import write_json
from memorizing.training import Trainer, make_display, prepare_corpus

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE / "queue"))
sys.path.append(str(HERE))

from attentions import choose_model, split_settings  # noqa: E402
from plan import ATTENTIONS, FIRST, NO_MEMORY, PAPER, TABLE_4  # noqa: E402

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
    parser.add_argument("--attentions", action="store_true", help="the arms of attentions/")
    parser.add_argument("--json", type=Path, help="default: in experiments/results")
    arguments = parser.parse_args()
    arms = ATTENTIONS
    if not arguments.attentions:
        arms = {name: (*FIRST, *settings) for name, settings in ARMS.items()}
    name = "step_times_attentions" if arguments.attentions else "step_times"
    output = arguments.json or HERE / "results" / f"{name}.json"
    base = load_config(str(HERE / "recipes" / f"{arguments.family}.toml"))
    corpus = prepare_corpus(base, make_display(False))
    trainers: dict[str, Trainer] = {}
    for name, settings in arms.items():
        config = base.replace(["training.evaluate_every=0", *split_settings(settings)[1]])
        torch.manual_seed(0)
        loader = SegmentLoader(
            corpus.train,
            config.training.rows,
            config.model.segment_len,
            corpus.tokenizer.start_token,
            seed=0,
            repeat=True,
        )
        model = choose_model(settings)(config.model)
        trainers[name] = Trainer(model, loader, config.training)
        trainers[name].run(arguments.fill)

    def make_step(trainer: Trainer):
        return lambda: trainer.run(trainer.step + 1)

    steps = {name: make_step(trainer) for name, trainer in trainers.items()}
    timings = time_interleaved(steps, num_pairs=arguments.turns, num_warmup=2)
    rows = [
        timings.compare(name, "cache")
        | {
            "num_weights": sum(p.numel() for p in trainer.model.parameters()),
            "state_bytes": count_state_bytes(trainer.model),
        }
        for name, trainer in trainers.items()
    ]
    table = Table("arm", "seconds a step", "times cache only", "weights", "state, MiB a document")
    for row in rows:
        numbers = (f"{row['seconds']:.3f}", f"{row['ratio']:.3f}", f"{row['num_weights']:,}")
        table.add_row(str(row["name"]), *numbers, f"{row['state_bytes'] / 2**20:.2f}")
    Console().print(table)
    values = {"tokens_per_step": 4096, "rows": rows, "machine": describe_machine()}
    write_json(output, values)


def count_state_bytes(model: MemorizingTransformer) -> int:
    """Bytes of a document's state once all that it keeps is full: caches, sums, slots, memory."""
    config, state = model.config, model.init_state(1)
    tokens = torch.zeros(1, config.segment_len, dtype=torch.int64)
    with evaluation_mode(model):
        for _ in range(-(-config.window // config.segment_len)):
            state = model(tokens, state).state.commit()
    return sum(t.numel() * t.element_size() for t in state.state_dict().values())


if __name__ == "__main__":
    main()
