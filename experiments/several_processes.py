"""What two processes that train as one hold and how fast they are, each on one core.

    python experiments/several_processes.py resident --out FILE       # some three minutes
    python experiments/several_processes.py speed --pairs 5 --out FILE

`resident`: the most bytes that a process has resident, sampled every 5 ms, with weights whole and
in parts, while it trains and saves checkpoints. `speed`: seconds of a step of two
processes with R rows each, against two that know nothing of each other and run at the same time.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import shutil
import socket
import statistics
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import accelerate.state  # noqa: F401
import numpy as np
import psutil
import torch
from torch.distributed.fsdp import fully_shard  # noqa: F401

from memorizing.config import ModelConfig, TrainingConfig
from memorizing.data import SegmentLoader, TokenizedDocument
from memorizing.model import MemorizingTransformer
from memorizing.ranks import join_ranks
from memorizing.training import Trainer

SHAPES: dict[str, dict[str, Any]] = {
    "resident": {
        "vocab_size": 1009, "num_layers": 24, "model_dim": 768, "num_heads": 6, "head_dim": 128,
        "ffn_dim": 3072, "segment_len": 16, "window": 16, "memory_layers": (17,), "capacity": 64,
        "num_neighbors": 4,
    },
    "speed": {
        "vocab_size": 4096, "num_layers": 4, "model_dim": 256, "num_heads": 4, "head_dim": 64,
        "ffn_dim": 1024, "segment_len": 256, "window": 256, "memory_layers": (2,),
        "capacity": 4096, "num_neighbors": 32,
    },
}  # fmt: skip
TRAINING: dict[str, dict[str, Any]] = {
    "resident": {"steps": 3, "checkpoint_every": 2},
    "speed": {"steps": 14, "checkpoint_every": 0},
}
ROWS = {"resident": 1, "speed": 4}
"""Of a process."""
NUM_WARM = 4
"""First steps, which are not timed."""


def work(kind: str, optimizer: str, shard: bool, folder: Path, launched: dict[str, Any]) -> Any:
    """Train in this process, which may be one of several, and tell about it."""
    os.environ.update({name: str(value) for name, value in launched.items()})
    process, peaks, start = psutil.Process(), [0], psutil.Process().memory_info().rss

    def sample() -> None:
        while True:
            peaks[0] = max(peaks[0], process.memory_info().rss)
            time.sleep(0.005)

    with join_ranks("cpu") as ranks:
        shape = ModelConfig(**SHAPES[kind])
        torch.manual_seed(0)
        model = MemorizingTransformer(shape)
        num_weights = sum(p.numel() for p in model.parameters())
        rng, length = np.random.default_rng(0), 40 * shape.segment_len
        documents = [
            TokenizedDocument(str(i), rng.integers(1, shape.vocab_size, length).astype(np.int32), 1)
            for i in range(16)
        ]
        config = TrainingConfig(
            rows=ROWS[kind] * ranks.size, optimizer=optimizer, shard=shard, precision="fp32",
            warmup_steps=1, **TRAINING[kind],
        )  # fmt: skip
        steps: list[float] = []
        nats: list[float] = []

        def note(metrics: Any) -> None:
            steps.append(metrics.step_s)
            nats.append(metrics.nats / metrics.num_targets)

        loader = SegmentLoader(documents, config.rows, shape.segment_len, 0, 0, repeat=True)
        if kind == "resident":
            threading.Thread(target=sample, daemon=True).start()
        Trainer(model, loader, config, run_dir=folder, on_step=note, ranks=ranks).run()
    return {
        "weights": num_weights, "resident": peaks[0], "imported": start, "loss": nats,
        "step_s": steps[NUM_WARM:],
    }  # fmt: skip


def run_child(sender: Any, *arguments: Any) -> None:
    """`work` in a forked process."""
    torch.set_num_threads(1)
    sender.send(work(*arguments))


def start(kind: str, *, num: int, together: bool, optimizer: str, shard: bool) -> list[Any]:
    """What processes tell that run at the same time, as one or each for itself."""
    root = Path(tempfile.mkdtemp(prefix="several_processes_"))
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    forking, children = multiprocessing.get_context("fork"), []
    for rank in range(num):
        launched = {
            "RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": num, "LOCAL_WORLD_SIZE": num,
            "MASTER_ADDR": "localhost", "MASTER_PORT": port,
        } if together and num > 1 else {}  # fmt: skip
        receiver, sender = forking.Pipe(duplex=False)
        folder = root / ("run" if together else str(rank))
        arguments = (sender, kind, optimizer, shard, folder, launched)
        child = forking.Process(target=run_child, args=arguments)
        child.start()
        sender.close()
        children.append((child, receiver))
    told = [receiver.recv() for _, receiver in children]
    for child, _ in children:
        child.join()
    shutil.rmtree(root)
    return told


def measure_resident(optimizer: str) -> dict[str, Any]:
    """One process, and two that hold the weights in parts."""
    (alone,) = start("resident", num=1, together=True, optimizer=optimizer, shard=False)
    parts = start("resident", num=2, together=True, optimizer=optimizer, shard=True)
    most = max(one["resident"] for one in parts)
    return {
        "optimizer": optimizer,
        "weights": alone["weights"],
        "one_process_mib": round(alone["resident"] / 2**20),
        "of_it_imports_mib": round(alone["imported"] / 2**20),
        "losses": [one["loss"] for one in (alone, *parts)],
        "each_of_two_mib": [round(one["resident"] / 2**20) for one in parts],
        "share": round(most / alone["resident"], 3),
    }


def measure_speed(optimizer: str, shard: bool, pairs: int) -> dict[str, Any]:
    """Pairs of two processes that work together, and two that do not; medians of steps."""
    found: dict[bool, list[float]] = {True: [], False: []}
    for pair in range(pairs):
        for together in (True, False) if pair % 2 else (False, True):
            told = start(
                "speed", num=2, together=together, optimizer=optimizer, shard=shard and together
            )
            # Together the slower one decides; apart each has a time of its own.
            found[together].append(statistics.mean(statistics.median(t["step_s"]) for t in told))
    shares = [apart / joint for apart, joint in zip(found[False], found[True], strict=True)]
    return {
        "optimizer": optimizer,
        "in_parts": shard,
        "rows_of_a_process": ROWS["speed"],
        "together_s": [round(value, 4) for value in found[True]],
        "apart_s": [round(value, 4) for value in found[False]],
        "share_of_the_ideal": round(statistics.median(shares), 3),
        "lowest_and_highest": [round(min(shares), 3), round(max(shares), 3)],
    }


def main() -> None:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("kind", choices=sorted(SHAPES))
    parser.add_argument("--optimizer", choices=["adamw", "muon"], default="adamw")
    parser.add_argument("--shard", action="store_true", help="speed: weights in parts")
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--out", type=Path, help="JSON file; what is measured is added")
    arguments = parser.parse_args()
    if arguments.kind == "resident":
        counts = measure_resident(arguments.optimizer)
    else:
        counts = measure_speed(arguments.optimizer, arguments.shard, arguments.pairs)
    counts |= {"processor": platform.processor() or platform.machine(), "cores": os.cpu_count()}
    print(json.dumps(counts))
    if arguments.out:
        done = json.loads(arguments.out.read_text()) if arguments.out.exists() else {}
        name = f"{arguments.kind} {arguments.optimizer}{' in parts' if arguments.shard else ''}"
        arguments.out.write_text(json.dumps({**done, name: counts}, indent=2) + "\n")


if __name__ == "__main__":
    main()
