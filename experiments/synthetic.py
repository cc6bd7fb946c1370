"""Synthetic tasks (`memorizing.data.synthetic`): trained on short documents, asked about long ones.

    python experiments/synthetic.py --task needles --seeds 0,1,2 \
        --json experiments/results/synthetic_needles.json

Tasks: pairs, rewrite, needles (one needle is the passkey task), tracking, strings, recall (MQAR),
distraction; `all` is one after another.
Every arm of a task starts with the same weights and sees the same documents. Local context is the
segment with the questions, so that answers are in the memory or nowhere; an arm without memory is
therefore measured at one length. The memory is read with a sharper softmax than in training
(`small_models.SHARPNESS`). An answer counts when all of its tokens are right, which is what
greedy decoding would give. What is done is kept in `--output` and not done again.

A task and seed are one of the `--jobs` that run side by side. Minutes on a GPU, with
`--jobs 16`; an hour or two on two cores.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from small_models import add_machine_options, list_machines, run_side_by_side, sharpen
from synthetic_tasks import TASKS, Arm, Cell, Task

from memorizing.benchmark.preparing import describe_machine
from memorizing.data.synthetic.batch import QuestionBatch
from memorizing.evaluation.answers import answer_questions, compute_wilson_interval
from memorizing.model import MemorizingTransformer
from memorizing.storage.files import write_json
from memorizing.training.questions import build_gathering_model


def train_arm(
    task: Task,
    arm: Arm,
    seed: int,
    folder: Path | None,
    device: torch.device | str = "cpu",
) -> MemorizingTransformer:
    """Train an arm, or take what is kept in the folder; an untrained one is as it starts."""
    num_blocks = task.train.num_blocks * arm.num_kept if arm.has_memory else 0
    if not arm.is_trained:
        config = task.model.to_model(num_blocks * task.block_len, task.block_len)
        return build_gathering_model(config, seed).to(device)
    print(f"{task.name}, seed {seed}, {arm.name}: training, unless it is done", flush=True)
    return task.model.train(
        lambda step, seeds: task.make(seeds, task.choose_cell(step)),
        seed,
        num_blocks=num_blocks,
        block_len=task.block_len,
        keeps_documents=arm.num_kept > 1,
        folder=folder,
        num_reports=5,
        device=device,
    )


def measure(model: MemorizingTransformer, task: Task, cell: Cell, seed: int) -> dict[str, Any]:
    """First answers about documents that no training and no other seed has seen."""
    num_read = cell.num_documents_read * cell.num_blocks * task.block_len
    rows = max(2, min(16, 2**18 // num_read))
    num_questions = cell.sizes.get("num_questions", 1)
    num_documents = max(-(-task.least_asked // num_questions), min(64, 2**18 // num_read))
    answers, is_first, groups = [], [], []
    first_seed = seed * 1_000_000
    for start in range(first_seed, first_seed + num_documents, rows):
        batch = task.make(range(start, start + rows), cell)
        others: list[QuestionBatch] = [
            task.make(range(start + 1000 * other, start + 1000 * other + rows), cell)
            for other in range(1, cell.num_documents_read)
        ]
        answers.append(answer_questions(model, batch, control=cell.control, others=others))
        is_first.append(batch.is_first)
        groups.append(batch.group)
    first = torch.cat(is_first)
    right, group = torch.cat([a.is_right for a in answers])[first], torch.cat(groups)[first]
    whole = right.all(-1)
    shares = [answer.own_share for answer in answers if answer.own_share is not None]

    def score(chosen: torch.Tensor) -> dict[str, Any]:
        num_right, num_asked = int(chosen.sum()), chosen.numel()
        return {
            "exact": num_right / num_asked,
            "interval": compute_wilson_interval(num_right, num_asked),
            "right": num_right,
            "asked": num_asked,
        }

    result = score(whole) | {
        "tokens_right": right.float().mean().item(),
        "nats": torch.cat([a.nats for a in answers])[first].mean().item(),
        "own_share": torch.cat(shares)[first].mean().item() if shares else None,
    }
    if len(group.unique()) > 1:
        result["by_group"] = {str(g): score(whole[group == g]) for g in group.unique().tolist()}
    return result


def run_seed(task: Task, seed: int, output: Path, device: torch.device | str = "cpu") -> None:
    """Train and measure what is not there yet, in `output/task/seed-N/result.json`."""
    settings, folder = task.describe(), output / task.name / f"seed-{seed}"
    path = folder / "result.json"
    found: dict[str, Any] = {"settings": settings, "scores": {}}
    if path.exists():
        found = json.loads(path.read_text(encoding="utf-8"))
    if found["settings"] != settings:
        raise SystemExit(f"{path} is of other settings; remove it or choose another --output")
    scores = found["scores"]
    for arm in task.arms:
        cells = [cell for cell in task.list_cells(arm) if f"{arm.name}/{cell}" not in scores]
        if not cells:
            continue
        found["machine"] = describe_machine()
        model = sharpen(train_arm(task, arm, seed, folder / arm.name, device), task.sharpness)
        for cell in cells:
            start_s = time.perf_counter()
            score = measure(model, task, cell, seed)
            seconds = time.perf_counter() - start_s
            scores[f"{arm.name}/{cell}"] = score | {"seconds": seconds}
            write_json(path, found)
            print(
                f"{task.name}, seed {seed}, {arm.name}, {cell}: {score['exact']:.1%} "
                f"({seconds:.0f} s)",
                flush=True,
            )


def collect(task: Task, seeds: Sequence[int], output: Path) -> dict[str, Any]:
    """The results of a task, all seeds together."""
    found = {}
    for seed in seeds:
        path = output / task.name / f"seed-{seed}" / "result.json"
        found[str(seed)] = json.loads(path.read_text(encoding="utf-8"))
    return {
        "task": task.name,
        "settings": task.describe(),
        "seeds": {seed: result["scores"] for seed, result in found.items()},
        "machines": list_machines(found.values()),
    }


def show(results: dict[str, Any]) -> None:
    """A line for each arm and cell: exact answers of every seed, and of all with their interval."""
    seeds = results["seeds"]
    table = Table(title=f"{results['task']}: whole answers right (greedy, exact match)")
    for name in ("arm", "what is read", *(f"seed {s}" for s in seeds), "all (95%)", "by group"):
        table.add_column(name, justify="left" if name in ("arm", "what is read") else "right")
    table.add_column("own share", justify="right")
    for name in next(iter(seeds.values())):
        scores = [scores[name] for scores in seeds.values()]
        right, asked = (sum(score[key] for score in scores) for key in ("right", "asked"))
        low, high = compute_wilson_interval(right, asked)
        groups: dict[str, list[dict[str, Any]]] = {}
        for score in scores:
            for group, part in score.get("by_group", {}).items():
                groups.setdefault(group, []).append(part)
        shares = [score["own_share"] for score in scores if score["own_share"] is not None]
        table.add_row(
            *name.split("/"),
            *(f"{score['exact']:.1%}" for score in scores),
            f"{right / asked:.1%} ({low:.1%} to {high:.1%})",
            " ".join(
                f"{sum(p['right'] for p in parts) / sum(p['asked'] for p in parts):.0%}"
                for _, parts in sorted(groups.items())
            ),
            f"{sum(shares) / len(shares):.2f}" if shares else "",
        )
    Console(width=160).print(table)


def main() -> None:
    """Run what is asked for and not done yet."""
    parser = argparse.ArgumentParser(description="Synthetic tasks with and without memory")
    parser.add_argument("--task", choices=[*TASKS, "all"], required=True)
    parser.add_argument("--seeds", default="0,1,2", help="initialization and documents")
    parser.add_argument("--output", type=Path, default=Path("runs/synthetic"))
    parser.add_argument("--json", type=Path, default=None, help="where all results go")
    add_machine_options(parser)
    arguments = parser.parse_args()
    names = list(TASKS) if arguments.task == "all" else [arguments.task]
    seeds = [int(seed) for seed in arguments.seeds.split(",")]
    calls = [
        (TASKS[name], seed, arguments.output, arguments.device) for name in names for seed in seeds
    ]
    run_side_by_side(run_seed, calls, arguments.jobs)
    everything = {name: collect(TASKS[name], seeds, arguments.output) for name in names}
    for results in everything.values():
        show(results)
    if arguments.json is not None:
        write_json(arguments.json, everything if len(names) > 1 else everything[names[0]])


if __name__ == "__main__":
    main()
