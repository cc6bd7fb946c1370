"""Whether what `memorizing plan` says of a training is what is measured, at sizes of this machine.

    python experiments/check_plan.py --json FILE       # some four minutes

Seconds of a step are of the processor, and the least of some, as others may use the machine. Rates
of the model's products and of the search, and what a look-up costs at any size, are taken from one
shape without memory and with two; steps of other shapes and capacities are planned with them, and
measured. Resident bytes: one process, and each of two with the weights in parts, as
`several_processes.py resident` measures them. CPU, fp32, one thread a process. What is in the JSON
already is not measured again.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import several_processes
import torch

from memorizing.benchmark.preparing import describe_machine, fill_state, run_step
from memorizing.config import Config, ModelConfig, TrainingConfig
from memorizing.model import MemorizingTransformer
from memorizing.planning import TrainingHardware, plan_training
from memorizing.storage.files import write_json
from memorizing.training.resources import deal_training, estimate_needs

BASE = ModelConfig(
    vocab_size=4096, num_layers=4, model_dim=256, num_heads=4, head_dim=64, ffn_dim=1024,
    segment_len=256, window=256, memory_layers=(2,), capacity=16_384, memory_dtype="float32",
)  # fmt: skip
SHAPES = {
    "8 layers": {"num_layers": 8},
    "width 512, 8 heads": {"model_dim": 512, "num_heads": 8, "ffn_dim": 2048},
    "65,536 entries": {"capacity": 65_536},
    "2 memory layers, 32,768 entries": {"memory_layers": (1, 2), "capacity": 32_768},
    "segments of 512": {"segment_len": 512, "window": 512},
}


FITTED = ("16,384 entries", "65,536 entries")
"""What the search costs is taken from these."""


def main() -> None:
    """Measure, and print beside it what was planned."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=15, help="of each shape, interleaved")
    options = parser.parse_args()
    torch.set_num_threads(1)
    done: dict[str, Any] = read(options.json)
    for name, check in (
        ("steps", partial(check_steps, options.steps)),
        ("resident", check_resident),
    ):
        if name not in done:
            done[name] = check()
            write_json(options.json, {**done, "machine": describe_machine()})
    for row in (*done["steps"], *done["resident"]):
        print(f"{row['what']:<40} {row['measured']:>8} planned {row['planned']:>8}", end=" ")
        print(f"{row['planned'] / row['measured']:.2f}")


def read(path: Path) -> dict[str, Any]:
    """What was measured before."""
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def check_steps(num_steps: int) -> list[dict[str, Any]]:
    """Seconds of a step of every shape, as planned with the rates of the first, and as measured."""
    shapes = {"without memory": replace(BASE, capacity=0), "16,384 entries": BASE}
    shapes |= {name: replace(BASE, **changes) for name, changes in SHAPES.items()}
    prepared = {name: prepare(shape) for name, shape in shapes.items()}
    took: dict[str, list[float]] = {name: [] for name in shapes}
    for _ in range(num_steps + 2):
        for name, (model, state, tokens) in prepared.items():
            start_s = time.process_time()
            prepared[name] = (model, run_step(model, state, tokens), tokens)
            took[name].append(time.process_time() - start_s)
            model.zero_grad(set_to_none=True)
    measured = {name: min(times[2:]) for name, times in took.items()}
    without = plan(shapes["without memory"], TrainingHardware())
    added_s, operations = (
        [measured[name] - measured["without memory"] for name in FITTED],
        [plan(shapes[name], TrainingHardware())["operations"]["search"] for name in FITTED],
    )
    second_s = (added_s[1] - added_s[0]) / (operations[1] - operations[0])
    lookups = BASE.segment_len * BASE.num_heads * len(BASE.memory_layers)
    hardware = TrainingHardware(
        tflops=without["operations"]["model"] / measured["without memory"] / 1e12,
        search_tflops=1 / second_s / 1e12,
        lookup_us=1e6 * (added_s[0] - second_s * operations[0]) / lookups,
    )
    print(hardware)
    return [
        {
            "what": f"step, {name}",
            "measured": round(measured[name], 4),
            "planned": round(plan(shape, hardware)["seconds"]["all"], 4),
        }
        for name, shape in shapes.items()
    ]


def prepare(shape: ModelConfig) -> tuple[Any, Any, Any]:
    """A model, its full state, and tokens of a row."""
    torch.manual_seed(0)
    model = MemorizingTransformer(shape)
    tokens = torch.randint(shape.vocab_size, (1, shape.segment_len + 1))
    return model, fill_state(model, tokens[:, :-1], shape.capacity, "exact"), tokens


def plan(shape: ModelConfig, hardware: TrainingHardware) -> dict[str, Any]:
    """For a row on one processor."""
    return plan_training(Config(model=shape, training=TrainingConfig(rows=1)), 1, hardware)


def check_resident() -> list[dict[str, Any]]:
    """MiB of a process besides its imports."""
    found = several_processes.measure_resident("adamw")
    shape = ModelConfig(**several_processes.SHAPES["resident"])
    rows = []
    for size, shard in ((1, False), (2, True)):
        training = TrainingConfig(rows=size * several_processes.ROWS["resident"], shard=shard)
        dealt = deal_training(training, several_processes.ROWS["resident"])
        needs = estimate_needs(shape, dealt, found["weights"], 4, "cpu", size)
        most = found["one_process_mib"] if size == 1 else max(found["each_of_two_mib"])
        rows.append(
            {
                "what": "MiB of one process" if size == 1 else "MiB of each of two, in parts",
                "measured": most - found["of_it_imports_mib"],
                "planned": round(needs.total / 2**20),
            }
        )
    return rows


if __name__ == "__main__":
    main()
