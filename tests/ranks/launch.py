"""Runs what the tests of several processes read, all in one go: `python -m tests.ranks.launch DIR`.

What is imported is imported once; every process is forked from this one. A launcher's part, the
environment and a free port, is played here; results go to JSON files, checkpoints to run folders.
"""

from __future__ import annotations

import atexit
import gc
import json
import math
import os
import shutil
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import accelerate.state
import numpy as np
import peft
import rich.console
import rich.progress
import rich.table
import tensorboard.compat.proto.event_pb2
import tensorboard.summary.writer.record_writer
import torch
import torch.profiler

import memorizing.analysis
import memorizing.run_report
from memorizing.cli import main
from memorizing.config import Control, ModelConfig, TrainingConfig
from memorizing.data import SegmentLoader, TokenizedDocument
from memorizing.errors import ConfigError, MemorizingError, RankError
from memorizing.evaluation import evaluate_documents, evaluate_model
from memorizing.memory import Memory, SpreadMemory
from memorizing.model import MemorizingTransformer
from memorizing.ranks import Ranks, join_ranks
from memorizing.ranks.pulse import Pulse
from memorizing.training import StepMetrics, Trainer, list_checkpoints, load_model
from memorizing.training.finetuning import FinetuneSettings
from memorizing.training.finetuning.finetuner import Finetuner
from tests.training.finetuning import tools

NEEDED = (accelerate, peft, rich, tensorboard, memorizing.analysis, memorizing.run_report)
"""So that no child imports them."""
LENGTHS = (67, 17, 29, 73, 5, 41, 53, 61, 3)
SEGMENT_LEN, ROWS, STEPS = 11, 5, 6
MODEL = ModelConfig(
    vocab_size=31, num_layers=3, model_dim=13, num_heads=2, head_dim=7, ffn_dim=37,
    segment_len=SEGMENT_LEN, window=SEGMENT_LEN, memory_layers=(1,), capacity=23, num_neighbors=5,
    smear_keys=True, empty_value=True, pointer=True,
)  # fmt: skip
TRAINING = TrainingConfig(
    steps=STEPS, rows=ROWS, warmup_steps=3, learning_rate=3e-3, log_every=2, precision="fp32",
    evaluate_every=3, evaluate_tokens=101, checkpoint_every=2, memory_closed_share=0.3,
    restart_share=0.2, keep_checkpoints=9,
)  # fmt: skip
RECIPE = """
[model]
num_layers = 2
model_dim = 13
num_heads = 2
head_dim = 7
ffn_dim = 37
segment_len = 11
window = 11
memory_layers = [1]
capacity = 23
num_neighbors = 5
[tokenizer]
vocab_size = 300
[data]
corpus = "files:{texts}"
validation = ["text3*"]
[training]
steps = 4
rows = 3
precision = "fp32"
log_every = 1
evaluate_every = 4
evaluate_tokens = 101
[evaluation]
capacities = [0, 23]
controls = ["other_document"]
"""
TIMEOUT_S = 4
SHARDED: dict[str, Any] = {"rows": 4, "optimizer": "muon", "shard": True}
ALL: dict[str, Any] = {"rows": 2, "train": "all", "shard": True}


def make_documents() -> list[TokenizedDocument]:
    rng = np.random.default_rng(0)
    return [
        TokenizedDocument(f"document {i}", rng.integers(1, 31, n).astype(np.int32), 2 * n)
        for i, n in enumerate(LENGTHS)
    ]


def make_trainer(ranks: Ranks, run_dir: Path, on_step: Any = None, **changes: Any) -> Trainer:
    config = replace(TRAINING, **changes)
    torch.manual_seed(config.seed)
    model = MemorizingTransformer(MODEL)
    documents = make_documents()
    loader = SegmentLoader(documents, config.rows, SEGMENT_LEN, 0, config.seed, repeat=True)
    return Trainer(
        model, loader, config, run_dir=run_dir, validation=documents[:3], on_step=on_step,
        ranks=ranks,
    )  # fmt: skip


def train(
    run_dir: Path,
    until: int = STEPS,
    on_step: Callable[[StepMetrics], None] | None = None,
    **changes: Any,
) -> dict[str, Any]:
    """Train up to a step, from the last checkpoint of the folder where there is one."""
    steps: list[Any] = []

    def note(metrics: StepMetrics) -> None:
        steps.append([metrics.nats, metrics.num_targets, metrics.grad_norm])
        if on_step is not None:
            on_step(metrics)

    with join_ranks("cpu") as ranks:
        trainer = make_trainer(ranks, run_dir, note, **changes)
        if checkpoints := list_checkpoints(run_dir):
            trainer.load(checkpoints[-1])
        result = trainer.run(until)
    return {
        "steps": steps,
        "stopped": result.interrupted,
        "last": result.steps,
        "validation": result.validation_nats,
        # Of what is dealt: a pointer is whole in all, and no small part of this model.
        "held": sum(p.numel() for p in trainer.optimizer.parameters())
        - sum(p.numel() for p in trainer.model.pointer.parameters()),
    }


def validate(run_dir: Path) -> float:
    """Nats per token that one process finds for what a run has written last."""
    model = load_model(run_dir).model
    # As much of each document as `evaluate_tokens` leaves of three.
    result = evaluate_documents(
        model, make_documents()[:3], 0, capacity=23, rows=2, max_tokens=4 * SEGMENT_LEN
    )
    return math.log(result.perplexity)


def evaluate(_: Path) -> dict[str, Any]:
    torch.manual_seed(3)
    model = MemorizingTransformer(MODEL)
    controls: list[Control | None] = [None, "off", "other_document", "shuffled"]
    with join_ranks("cpu") as ranks:
        own = {
            str(control): evaluate_documents(
                model, make_documents(), 0, capacity=23, rows=2, control=control, ranks=ranks
            )
            for control in controls
        }
        pretrained = {
            str(control): evaluate_model(
                tools.make_model(), tools.make_documents(31, 2, 17), control=control, ranks=ranks
            )
            for control in controls
        }
        joint = MemorizingTransformer(
            replace(MODEL, capacity=22, memory_dtype="float32", combine="joint")
        )
        spread = {
            str(control): evaluate_documents(
                joint, make_documents(), 0, capacity=22, rows=2, control=control, ranks=ranks,
                spread=True,
            )
            for control in controls
        }  # fmt: skip
    return {
        kind: {
            name: [document.token_nats.tolist() for document in result.documents]
            for name, result in results.items()
        }
        for kind, results in (("own", own), ("pretrained", pretrained), ("spread", spread))
    }


def search_spread(_: Path) -> dict[str, Any]:
    """What differs between a memory and one that is spread, for look-ups of the same entries."""
    generator, differs = torch.Generator().manual_seed(0), []
    with join_ranks("cpu") as ranks:
        shape = (3, 2, 14, 5, torch.float32)
        one, parts = (
            Memory(*shape, keep_tokens=True),
            SpreadMemory(ranks, *shape, keep_tokens=True),
        )
        for length in (3, 0, 1, 17, 8, 11):
            # Whole numbers, so that many scores are equal.
            keys, values = torch.randint(-1, 2, (2, 3, 2, length, 5), generator=generator).float()
            valid = torch.rand(3, length, generator=generator) < 0.7
            tokens = torch.randint(97, (3, length), generator=generator)
            queries = torch.randint(-1, 2, (3, 2, 7, 5), generator=generator).float()
            both = []
            for memory in (one, parts):
                memory.append(keys, values, valid, tokens)
                for options in (
                    {},
                    {"num_hidden": torch.arange(21).view(3, 7) % 5},
                    {"donor_rows": torch.tensor([2, 0, 1]), "value_seed": 3},
                    {"is_open": torch.tensor([True, False, True])},
                ):
                    seen = memory.retrieve(queries, 4, **options)
                    there = seen.neighbors.valid.unsqueeze(-1)
                    places = memory.compute_positions(seen.neighbors.slots)
                    both.append([
                        seen.neighbors.slots, seen.neighbors.scores, there,
                        seen.fetch_keys() * there, seen.fetch_values() * there,
                        places * there.squeeze(-1), memory.size, memory.num_appended,
                        seen.tokens * there.squeeze(-1),
                    ])  # fmt: skip
            half = len(both) // 2
            for mine, theirs in zip(both[:half], both[half:], strict=True):
                differs += [not torch.equal(a, b) for a, b in zip(mine, theirs, strict=True)]
            if length == 8:
                rows = torch.tensor([True, False, False])
                one.reset(rows)
                parts.reset(rows)
                order = torch.tensor([1, 2, 0])
                one, parts = one.select_rows(order), parts.select_rows(order)
        held = parts._part.keys.numel() / one.keys.numel()
    return {"held": held, "differs": differs}


def finetune(
    run_dir: Path, until: int = 4, memory: dict[str, Any] | None = None, **changes: Any
) -> dict[str, Any]:
    steps: list[Any] = []
    settings = FinetuneSettings(**{
        "steps": 4, "rows": 3, "lora_rank": 3, "evaluate_every": 0, "warmup_steps": 2,
        "gate_learning_rate": 0.1, "log_every": 1, "checkpoint_every": 2, **changes,
    })  # fmt: skip
    with join_ranks("cpu") as ranks:
        tuner = Finetuner(
            tools.make_model(**(memory or {})), tools.make_documents(3 * 7, 47, 5 * 7 + 1, 2),
            tools.START, settings, run_dir=run_dir, ranks=ranks,
            on_step=lambda m: steps.append([m.nats, m.num_targets, m.grad_norm]),
        )  # fmt: skip
        if checkpoints := list_checkpoints(run_dir):
            tuner.load(checkpoints[-1])
        tuner.run(until)
    return {"steps": steps}


def signal_after(step: int, number: int) -> Callable[[StepMetrics], None]:
    """Send a process a signal after a step, if it is rank 1."""

    def on_step(metrics: StepMetrics) -> None:
        if metrics.step == step and os.environ["RANK"] == "1":
            os.kill(os.getpid(), number)

    return on_step


def join(who: int, do: Callable[[], object]) -> int:
    """Join the others, and in one rank do something before; how many there are."""
    if os.environ["RANK"] == str(who):
        do()
    with join_ranks("cpu") as ranks:
        return int(ranks.sum([1.0])[0]) * 10


def end_before_connecting() -> None:
    """Meet the others, and be killed."""
    Pulse("localhost", int(os.environ["MASTER_PORT"]), int(os.environ["RANK"]), 2, 1.0)
    time.sleep(0.7)
    os.kill(os.getpid(), signal.SIGKILL)


def refuse(_: Path) -> dict[str, Any]:
    """What ranks refuse together; after an error nothing is waited for."""
    refused = []
    with join_ranks("cpu") as ranks:
        trials: list[Callable[[], object]] = [
            lambda: ranks.check_equal("number", ranks.rank),
            lambda: ranks.deal(1),
            lambda: make_trainer(ranks, Path("none"), crossbatch_segments=1),
            lambda: make_trainer(ranks, Path("none"), shard=True),
            lambda: make_trainer(ranks, Path("none"), **SHARDED, crossbatch_segments=1),
            lambda: make_trainer(ranks, Path("none"), **(SHARDED | {"optimizer": "adafactor"})),
            lambda: finetune(Path("none"), **(ALL | {"train": "gates"})),
            lambda: finetune(Path("none"), memory=tools.PASSAGES | {"read": "both"}, **ALL),
            lambda: SpreadMemory(ranks, 1, 2, 23, 5),
            lambda: ranks.check_equal("number", ranks.size),
        ]
        for trial in trials:
            try:
                trial()
                refused.append("")
            except (ConfigError, RankError) as error:
                refused.append(str(error))
        rows = ranks.share([[rank, *Ranks(rank, 3).deal(7)] for rank in range(3)])
    return {"refused": refused, "rows": rows}


class Launcher:
    """Forks processes and keeps what they return and print."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.results = folder, dict[str, Any]()

    def run_all(self, size: int, works: dict[str, Callable[[], Any]]) -> None:
        """Run several things one after another in the same processes."""
        done = f"{size} of {', '.join(works)}"
        self.run(done, size, lambda: {name: work() for name, work in works.items()})
        for name in works:
            self.results[f"{name} {size}"] = [
                {**one, "value": one["value"] and one["value"][name]} for one in self.results[done]
            ]

    def run(self, name: str, size: int, work: Callable[[], Any], **settings: str) -> None:
        """Run something in `size` processes; note what each returns, prints and ends with."""
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = free.getsockname()[1]
        start_s, children = time.monotonic(), []
        for rank in range(size):
            files = [self.folder / f"{name}.{rank}.{end}" for end in ("out", "err", "json")]
            child = os.fork()
            if not child:
                if size > 1:
                    os.environ.update(
                        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(size),
                        LOCAL_WORLD_SIZE=str(size), MASTER_ADDR="localhost", MASTER_PORT=str(port),
                    )  # fmt: skip
                os.environ.update(settings)
                _run_child(work, files)
            children.append((child, files))
        ends: dict[int, float] = {}
        statuses: dict[int, int] = {}
        stopped: set[int] = set()
        while len(ends) < size:
            child, status = os.waitpid(-1, os.WUNTRACED)
            if os.WIFSTOPPED(status):
                stopped.add(child)
                start_s = time.monotonic()
                continue
            ends[child] = time.monotonic() - start_s
            statuses[child] = os.waitstatus_to_exitcode(status)
            if len(ends) + len(stopped) == size:
                for one in stopped:
                    os.kill(one, signal.SIGKILL)
                stopped = set()
        self.results[name] = [
            {
                "status": statuses[child],
                "seconds": ends[child],
                "out": files[0].read_text(),
                "err": files[1].read_text(),
                "value": json.loads(files[2].read_text()) if files[2].exists() else None,
            }
            for child, files in children
        ]


def _run_child(work: Callable[[], Any], files: list[Path]) -> None:
    for number, file in enumerate(files[:2], 1):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT), number)
    status = 0
    try:
        value = work()
        status = value if isinstance(value, int) else 0
        files[2].write_text(json.dumps(value))
    except MemorizingError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        status = 3
    except BaseException:
        traceback.print_exc()
        status = 4
    atexit._run_exitfuncs()
    sys.stdout.flush()
    os._exit(status)


def launch(folder: Path) -> dict[str, Any]:
    """Everything, in some seconds."""
    os.environ["MEMORIZING_CACHE"] = str(folder / "cache")
    torch.set_num_threads(1)
    main(["--version"])  # what it imports too
    gc.freeze()
    launcher = Launcher(folder)
    run = launcher.run
    alike: dict[str, Callable[[int], Any]] = {
        "evaluate": lambda _: evaluate(folder),
        "train": lambda size: train(folder / f"train {size}"),
        "sharded": lambda size: train(folder / f"sharded {size}", **SHARDED),
        "gates": lambda size: finetune(folder / f"gates {size}", train="gates"),
        "lora": lambda size: finetune(folder / f"lora {size}", 4 if size == 1 else 2),
        "all": lambda size: finetune(folder / f"all {size}", 4 if size == 1 else 2, **ALL),
        "passages": lambda size: finetune(
            folder / f"passages {size}", 4 if size == 1 else 2, tools.PASSAGES
        ),
        "passages in parts": lambda size: finetune(
            folder / f"passages in parts {size}", 4 if size == 1 else 2, tools.PASSAGES, **ALL
        ),
    }
    goes_on = {"train": "train 1-2-1", "sharded": "sharded 1-2"}
    later: dict[int, dict[str, Callable[[], Any]]] = {
        1: {},
        2: {
            "train 1-2": lambda: train(folder / "train 1-2-1", 4),
            "sharded 1-2": lambda: train(
                folder / "sharded 1-2", **SHARDED, gradient_checkpointing=True
            ),
            "refuse": lambda: refuse(folder),
            "search": lambda: search_spread(folder),
        },
    }
    for size in (1, 2):
        works = {name: lambda work=work, n=size: work(n) for name, work in alike.items()}
        launcher.run_all(size, works | later[size])
        # The first steps of what goes on in another number of processes were taken already.
        kept = Path("checkpoints", "step-000002")
        if size == 1:
            for begun, name in goes_on.items():
                shutil.copytree(folder / f"{begun} 1" / kept, folder / name / kept)
    for begun, name in (("train 2", "train 2-3"), ("sharded 2", "sharded 2-1")):
        shutil.copytree(folder / begun / kept, folder / name / kept)
    launcher.run_all(
        1,
        {
            "sharded 2, whole": lambda: validate(folder / "sharded 2"),
            "train 1-2-1": lambda: train(folder / "train 1-2-1"),
            "sharded 2-1": lambda: train(folder / "sharded 2-1", **SHARDED),
            "lora 2-1": lambda: finetune(folder / "lora 2"),
            "all 2-1": lambda: finetune(folder / "all 2", **ALL),
            "passages 2-1": lambda: finetune(folder / "passages 2", memory=tools.PASSAGES),
            "passages in parts 2-1": lambda: finetune(
                folder / "passages in parts 2", memory=tools.PASSAGES, **ALL
            ),
        },
    )
    run("train 2-3", 3, lambda: train(folder / "train 2-3"))
    limit = {"MEMORIZING_RANK_TIMEOUT_S": str(TIMEOUT_S)}
    killed, stop = folder / "killed", signal_after(3, signal.SIGKILL)
    run("killed", 2, lambda: train(killed, on_step=stop), **limit)
    still = signal_after(1, signal.SIGSTOP)
    run("stalled", 2, lambda: train(folder / "stalled", on_step=still), **limit)
    brief = {"MEMORIZING_RANK_TIMEOUT_S": "1"}
    for who in (0, 1):
        run(f"absent {who}", 2, lambda w=who: join(w, lambda: os._exit(0)), **brief)
        run(f"gone {who}", 2, lambda w=who: join(w, end_before_connecting), **brief)
    run("late", 2, lambda: join(1, lambda: time.sleep(2)), **brief)
    run("killed, resumed", 2, lambda: train(killed))
    asked = signal_after(3, signal.SIGTERM)
    run("stopped", 2, lambda: train(folder / "stopped", on_step=asked))
    texts = folder / "texts"
    texts.mkdir()
    rng = np.random.default_rng(1)
    for index in range(6):
        words = rng.integers(0, 43, 60 + 31 * index)
        (texts / f"text{index}.txt").write_text(" ".join(f"word{word}" for word in words))
    (folder / "recipe.toml").write_text(RECIPE.format(texts=texts))
    for size in (1, 2):
        words = [str(folder / "recipe.toml"), "--run", str(folder / f"cli {size}")]
        run(f"cli train {size}", size, lambda w=words: main(["train", *w]))
        shown = [words[2], "--use", "all", "--json", str(folder / f"evaluated {size}.json")]
        run(f"cli evaluate {size}", size, lambda w=shown: main(["evaluate", *w]))
    run("cli train again", 2, lambda: main(["train", *words]), **limit)
    return launcher.results


if __name__ == "__main__":
    place = Path(sys.argv[1])
    (place / "results.json").write_text(json.dumps(launch(place)))
