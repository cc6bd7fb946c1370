"""A training step with 61,440 memory entries: ours against memorizing-transformers-pytorch 0.4.1.

Both models have 12 layers of d = 1024, 8 heads of 128, feed-forward 4096, a vocabulary of 32,000,
segments and XL caches of 512 tokens, one memory layer (the 9th), 32 neighbors and one row. A step
is forward, loss and backward, and writing the segment into memory; there is no dropout. They are
not the same model: the package has one key and value head for all query heads (an eighth of the
keys to store and to index), one joint softmax and no gate, and the weights of its logits are not
tied. It computes in fp32 only (its memory goes through numpy, which has no bf16); ours is timed in
bf16 and in fp32.

The package needs an environment of its own, as it declares faiss-gpu and leaves out einops-exts:

    python -m venv .venv-package
    .venv-package/bin/python -m pip install torch==2.13.0 numpy==2.4.6 filelock==4.2.11 \
        einops==0.8.2 einops-exts==0.0.4 joblib==1.6.0 faiss-cpu==1.15.1
    .venv-package/bin/python -m pip install --no-deps memorizing-transformers-pytorch==0.4.1
    python experiments/compare_packages.py --python .venv-package/bin/python --pairs 5

(For the CPU build of torch, name its address to pip as the README's "Installation" says.) One
process for each model waits until it is told to make one step, so that pairs are measured in one
run, in turns; the others sleep meanwhile. The package adds 512 entries to its index in every step;
it starts with so many fewer that it ends with 61,440, and ours always holds 61,440.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

VOCAB_SIZE, SEGMENT_LEN, NUM_LAYERS, MODEL_DIM, NUM_HEADS, HEAD_DIM = 32_000, 512, 12, 1024, 8, 128
MEMORY_LAYER = 8
"""Counted from 0; the package counts from 1."""
NUM_NEIGHBORS = 32
PACKAGE = "memorizing-transformers-pytorch"
OURS = ("ours_bf16", "ours_fp32")
RESULTS = Path(__file__).parent / "results" / "compare_packages.json"


class Worker:
    """A process that makes one training step whenever it is told to."""

    def __init__(self, name: str, python: str, settings: dict[str, Any]) -> None:
        """Start it, and wait until its memory is full."""
        # Threads that spin while they wait would slow down the process whose turn it is.
        environment = {**os.environ, "OMP_WAIT_POLICY": "PASSIVE"}
        if name not in OURS:
            environment.pop("PYTHONPATH", None)
        self._process = subprocess.Popen(
            [python, __file__, "--worker", name],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )
        self.description = self.ask(settings)

    def ask(self, message: dict[str, Any]) -> dict[str, Any]:
        """Send a line of JSON and read one."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            print(json.dumps(message), file=self._process.stdin, flush=True)
        except BrokenPipeError:
            sys.exit("a worker process ended early; its error is above")
        line = self._process.stdout.readline()
        if not line:
            sys.exit("a worker process ended early; its error is above")
        return json.loads(line)

    def close(self) -> None:
        """End the process."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


def main() -> None:
    """Start the workers, measure in turns, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--python", help="python of the environment that has the package")
    parser.add_argument("--pairs", type=int, default=5, help="steps of the package")
    parser.add_argument("--own-steps", type=int, default=4, help="our steps for each of these")
    parser.add_argument("--warmup", type=int, default=2, help="steps before, not counted")
    parser.add_argument("--entries", type=int, default=61_440)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--json", type=Path, default=RESULTS)
    parser.add_argument("--worker", choices=[*OURS, PACKAGE], help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker is not None:
        run_worker(arguments.worker)
        return
    num_added = (arguments.pairs + arguments.warmup) * SEGMENT_LEN
    if arguments.python is None or arguments.pairs < 1 or arguments.entries <= num_added:
        parser.error("give --python, at least one pair, and entries for more steps than these")
    compare(arguments)


def compare(arguments: argparse.Namespace) -> None:
    """Measure in turns: our steps in bf16 and fp32, then one of the package."""
    from memorizing.storage.files import write_json

    settings = {
        "entries": arguments.entries,
        "num_steps": arguments.pairs + arguments.warmup,
        "threads": arguments.threads,
    }
    python_of = {**dict.fromkeys(OURS, sys.executable), PACKAGE: arguments.python}
    workers = {name: Worker(name, python, settings) for name, python in python_of.items()}
    seconds: dict[str, list[float]] = {name: [] for name in workers}
    for turn in range(-arguments.warmup, arguments.pairs):
        for name, worker in workers.items():
            num_steps = arguments.own_steps if name in OURS else 1
            steps = [worker.ask({"step": True})["seconds"] for _ in range(num_steps)]
            if turn >= 0:
                # Ours is measured several times in the time of one: the median of them is paired.
                seconds[name].append(statistics.median(steps))
            print(f"turn {turn}: {name} {steps[-1]:.3f} s", file=sys.stderr)
    descriptions = {name: worker.ask({"step": False}) for name, worker in workers.items()}
    for name, worker in workers.items():
        descriptions[name] |= worker.description
        worker.close()
    check(descriptions, arguments.entries)
    result = describe(seconds, descriptions, arguments)
    show(result)
    write_json(arguments.json, result)


def check(descriptions: dict[str, dict[str, Any]], entries: int) -> None:
    """Refuse to report speeds of steps whose loss is no number or whose memory is not full."""
    for name, values in descriptions.items():
        if not (0 < values["loss"] < 100) or values["entries"] != entries:
            sys.exit(
                f"{name} ended with a loss of {values['loss']} and {values['entries']:,} entries "
                f"(expected {entries:,}): no speed is reported"
            )


def describe(
    seconds: dict[str, list[float]],
    descriptions: dict[str, dict[str, Any]],
    arguments: argparse.Namespace,
) -> dict[str, Any]:
    """Medians, and how many times as fast ours is, pair by pair."""
    from memorizing.benchmark.preparing import describe_machine

    rows = []
    for name, own in seconds.items():
        speedups = [theirs / ours for ours, theirs in zip(own, seconds[PACKAGE], strict=True)]
        rows.append(
            {
                "name": name,
                "entries": arguments.entries,
                "seconds": statistics.median(own),
                "compared_with": PACKAGE,
                "ratio": statistics.median(1 / speedup for speedup in speedups),
                "speedup": statistics.median(speedups),
                "all_seconds": own,
                **descriptions[name],
            }
        )
    return {
        "experiment": "compare_packages",
        "num_pairs": arguments.pairs,
        "own_steps_per_pair": arguments.own_steps,
        **describe_machine(),
        "threads": arguments.threads,
        "rows": rows,
    }


def show(result: dict[str, Any]) -> None:
    """Print a line for each model."""
    from rich.console import Console
    from rich.table import Table

    from memorizing.benchmark.preparing import summarize_machine

    table = Table(title=f"a training step with {result['rows'][0]['entries']:,} entries")
    for name in ("", "weights", "step s", "times as fast"):
        table.add_column(name, justify="right" if name else "left")
    for row in result["rows"]:
        cells = [f"{row['parameters']:,}", f"{row['seconds']:.3f}", f"{row['speedup']:.1f}"]
        table.add_row(row["name"], *cells)
    console = Console()
    console.print(table)
    console.print(f"medians of {result['num_pairs']} pairs", highlight=False)
    console.print(summarize_machine(result), highlight=False)


def run_worker(name: str) -> None:
    """Read lines of JSON: settings first, then whether to make a step; answer each by a line."""
    # What libraries print must not be taken for an answer.
    answers, sys.stdout = sys.stdout, sys.stderr
    settings = json.loads(sys.stdin.readline())
    import torch

    torch.set_num_threads(settings["threads"])
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        if name in OURS:
            step, finish, values = make_ours(settings, name.removeprefix("ours_"))
        else:
            step, finish, values = make_theirs(settings, Path(folder))
        print(json.dumps(values), file=answers, flush=True)
        loss = float("nan")
        for line in sys.stdin:
            if json.loads(line)["step"]:
                start = time.perf_counter()
                loss = step()
                answer = {"seconds": time.perf_counter() - start}
            else:
                answer = {"loss": loss, "entries": finish()}
            print(json.dumps(answer), file=answers, flush=True)


Made = tuple[Callable[[], float], Callable[[], int], dict[str, Any]]
"""A step that returns its loss, a function that counts the entries, and a description."""


def draw_segment() -> tuple[Any, Any]:
    """New random tokens and their targets: the same ones again would insert the same keys again."""
    import torch

    tokens = torch.randint(1, VOCAB_SIZE, (1, SEGMENT_LEN + 1))  # 0 is the package's padding
    return tokens[:, :-1], tokens[:, 1:]


def make_ours(settings: dict[str, Any], precision: str) -> Made:
    """Our model with a full memory, its search checked."""
    import torch

    from memorizing.benchmark.preparing import DTYPES, fill_state
    from memorizing.benchmark.verification import check_state
    from memorizing.config import ModelConfig
    from memorizing.loss import sum_nats
    from memorizing.model import MemorizingTransformer

    config = ModelConfig(
        vocab_size=VOCAB_SIZE,
        num_layers=NUM_LAYERS,
        model_dim=MODEL_DIM,
        num_heads=NUM_HEADS,
        head_dim=HEAD_DIM,
        ffn_dim=4 * MODEL_DIM,
        segment_len=SEGMENT_LEN,
        window=SEGMENT_LEN,
        memory_layers=(MEMORY_LAYER,),
        capacity=settings["entries"],
        num_neighbors=NUM_NEIGHBORS,
    )
    model = MemorizingTransformer(config)
    model.compute_dtype = DTYPES[precision]
    valid = torch.ones(1, SEGMENT_LEN, dtype=torch.bool)
    state = fill_state(model, draw_segment()[0], settings["entries"])
    check_state(state, config)

    def step() -> float:
        nonlocal state
        inputs, targets = draw_segment()
        model.zero_grad(set_to_none=True)
        output = model(inputs, state)
        loss = sum_nats(output.logits, targets, valid) / SEGMENT_LEN
        loss.backward()
        state = output.state.commit()
        return loss.item()

    def count_entries() -> int:
        return int(state.memories[MEMORY_LAYER].size)

    num_weights = sum(parameter.numel() for parameter in model.parameters())
    return step, count_entries, {"parameters": num_weights, "precision": precision}


def make_theirs(settings: dict[str, Any], folder: Path) -> Made:
    """The package's model; its memory is filled through its own `add`, with keys of length 1."""
    import faiss
    import torch
    from memorizing_transformers_pytorch import MemorizingTransformer

    faiss.omp_set_num_threads(settings["threads"])
    model = MemorizingTransformer(
        num_tokens=VOCAB_SIZE,
        dim=MODEL_DIM,
        depth=NUM_LAYERS,
        dim_head=HEAD_DIM,
        heads=NUM_HEADS,
        memorizing_layers=(MEMORY_LAYER + 1,),
        max_knn_memories=2 * settings["entries"],
        num_retrieved_memories=NUM_NEIGHBORS,
        xl_max_memories=SEGMENT_LEN,
        knn_memories_directory=str(folder),
    )
    memories = model.create_knn_memories(batch_size=1)
    (memory,) = memories
    # A first call has no cache to pass on to the memory, so that it adds nothing.
    with torch.no_grad():
        _, cache = model(draw_segment()[0], memories)
    missing = settings["entries"] - settings["num_steps"] * SEGMENT_LEN
    for start in range(0, missing, 8192):
        keys, values = torch.randn(2, 1, min(8192, missing - start), HEAD_DIM)
        memory.add(torch.stack([torch.nn.functional.normalize(keys, dim=-1), values], dim=-2))

    def step() -> float:
        nonlocal cache
        inputs, targets = draw_segment()
        model.zero_grad(set_to_none=True)
        loss, cache = model(inputs, memories, xl_memories=cache, labels=targets)
        loss.backward()
        return loss.item()

    def count_entries() -> int:
        return memory.knns[0].index.ntotal

    description = {
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "precision": "fp32",
        "package_version": metadata.version(PACKAGE),
        "torch_version": torch.__version__,
        "faiss_version": metadata.version("faiss-cpu"),
    }
    return step, count_entries, description


if __name__ == "__main__":
    main()
