"""Train with memory and without, evaluate both on unseen source code, and say what it means."""

from __future__ import annotations

import shutil
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from memorizing.analysis import (
    Example,
    describe_reach,
    explain_helped_tokens,
    find_helped_tokens,
    make_result_table,
    plot_capacities,
    render_examples,
)
from memorizing.config import Config, load_config
from memorizing.data import TokenizedDocument, Tokenizer, tokenize_documents
from memorizing.demo import story
from memorizing.demo.probe import estimate_duration
from memorizing.devices import find_device
from memorizing.errors import RunFolderError
from memorizing.evaluation import (
    EvaluationResult,
    compare_results,
    evaluate_capacities,
    evaluate_documents,
)
from memorizing.metrics import Difference
from memorizing.model import MemorizingTransformer
from memorizing.storage.files import write_bytes, write_json
from memorizing.training import (
    Display,
    TrainingResult,
    choose_precision,
    load_model,
    make_display,
    prepare_corpus,
    train,
)

_MARK = "demo.json"
"""A folder that holds this file is a demo's, and may be replaced by the next."""


@dataclass(frozen=True)
class _Evaluation:
    cache_only: EvaluationResult
    memory: dict[str, EvaluationResult]
    """By capacity as text, rising, then by control."""
    differences: dict[str, Difference]
    examples: list[Example]
    evaluate_s: float


def run_demo(
    *,
    seed: int = 0,
    steps_factor: float = 1.0,
    run_dir: Path | str = Path("runs/demo"),
    recipe: str | Path = "demo",
    console: Console | None = None,
) -> dict[str, Any]:
    """Show on real source code what a memory is worth. Takes minutes, and says how many.

    Two models with the same weights at the start read the same tokens in the same order, one with
    memory and one with the Transformer-XL cache only. Both are evaluated on documents that neither
    saw.

    Args:
        seed: of the initial weights and the order of documents.
        steps_factor: train this many times as long.
        run_dir: replaced if an earlier demo made it.
        recipe: a recipe that holds test documents out.
        console: where the story is told; by default standard output.

    Returns:
        What `result.json` holds: `perplexity` and `bits_per_byte` (by `cache_only`, each capacity,
        `off`, `other_document`, `shuffled`); `change`, relative, of perplexity from cache only, and
        its 95% `intervals`, by the same names; `interval`, that of the largest capacity; `train_s`,
        `evaluate_s`, `tokens_per_s` (of training, both models), `by_model`, `examples` and the
        settings. Empty after Ctrl-C.

    Raises:
        RunFolderError: the folder holds something else than a demo.
    """
    run_dir = Path(run_dir)
    console = console or Console()
    config = load_config(recipe).replace([f"training.seed={seed}"])
    steps = max(1, round(config.training.steps * steps_factor))
    config = config.replace([f"training.steps={steps}"])
    _clear_folder(run_dir)
    console.print(story.introduce(config))

    display = make_display(True)
    corpus = prepare_corpus(config, display)
    tokenizer = corpus.tokenizer
    test = tokenize_documents(corpus.test, tokenizer)
    device = find_device()
    precision = choose_precision(
        config.training.precision, config.model.model_dim, config.model.ffn_dim, device
    )
    # Probed once: both models must be trained alike.
    config = config.replace([f"training.precision={precision.name}"])
    estimate = estimate_duration(config, test, precision.dtype, device)
    console.print(story.announce(config, corpus, test, estimate))

    arms = {"cache_only": 0, "memory": config.model.capacity}
    trained: dict[str, TrainingResult] = {}
    for number, (name, capacity) in enumerate(arms.items(), start=1):
        console.print(story.title_training(number, name))
        arm = replace(config, name=f"demo-{name}", model=replace(config.model, capacity=capacity))
        trained[name] = train(arm, run_dir / name, device=device, corpus=corpus)
        if trained[name].interrupted:
            console.print("Stopped. Run it again to start over; it will replace this folder.")
            return {}

    console.print(story.title_evaluation(test))
    run_dirs = {name: run_dir / name for name in arms}
    found = _evaluate(config, run_dirs, device, precision.dtype, test, tokenizer, display)
    console.print(
        make_result_table(
            found.memory,
            baseline=found.cache_only,
            baseline_name="cache only",
            differences=found.differences,
        )
    )
    reach = describe_reach(found.memory)
    if reach:
        console.print(reach, highlight=False)
    console.print(story.conclude(found.cache_only, found.memory, found.differences))
    console.print(story.title_examples())
    console.print(render_examples(found.examples, baseline_name="cache only"))

    result = _collect(config, seed, trained, found)
    plot_capacities(
        found.memory,
        run_dir / "perplexity.png",
        baseline=found.cache_only,
        baseline_name="cache only",
        title="Unseen source code: perplexity against the size of the memory",
    )
    write_json(run_dir / "result.json", result)
    console.print(story.point_to(run_dir))
    return result


def _clear_folder(run_dir: Path) -> None:
    """Remove an earlier demo, and mark the folder as one."""
    if run_dir.exists() and (not run_dir.is_dir() or any(run_dir.iterdir())):
        if not (run_dir / _MARK).is_file():
            raise RunFolderError(
                f"{run_dir} exists and was not made by a demo; move it away, or run the demo "
                "elsewhere"
            )
        shutil.rmtree(run_dir)
    run_dir.mkdir(parents=True, exist_ok=True)
    write_bytes(run_dir / _MARK, b'{"made_by": "memorizing demo"}\n')


def _evaluate(
    config: Config,
    run_dirs: dict[str, Path],
    device: torch.device,
    dtype: torch.dtype,
    test: list[TokenizedDocument],
    tokenizer: Tokenizer,
    display: Display,
) -> _Evaluation:
    start_s = time.monotonic()
    models: dict[str, MemorizingTransformer] = {}
    for name, path in run_dirs.items():
        models[name] = load_model(path, device=device).model
        models[name].compute_dtype = dtype
    settings = config.evaluation
    reader: dict[str, Any] = {"rows": settings.rows, "max_tokens": settings.max_tokens_per_document}
    num_runs = 1 + len(settings.capacities) + len(settings.controls)

    def report(done_runs: int, runs: int, done: int, total: int) -> None:
        facts = {"reading": "cache only" if done_runs == 0 else "with memory, and the controls"}
        share = (done_runs + runs * done / max(1, total)) / num_runs
        display.update(int(100 * share), facts)

    display.start(0, 100, unit="percent")
    cache_only = evaluate_documents(
        models["cache_only"],
        test,
        tokenizer.start_token,
        capacity=0,
        progress=lambda done, total: report(0, 1, done, total),
        **reader,
    )
    memory = evaluate_capacities(
        models["memory"],
        test,
        tokenizer.start_token,
        capacities=settings.capacities,
        controls=settings.controls,  # type: ignore[arg-type]
        progress=lambda done, total: report(1, num_runs - 1, done, total),
        **reader,
    )
    display.stop()
    differences = {name: compare_results(result, cache_only) for name, result in memory.items()}
    capacity = max(settings.capacities)
    helped = find_helped_tokens(
        memory[str(capacity)],
        cache_only,
        test,
        tokenizer,
        min_position=config.model.segment_len,
    )
    examples = explain_helped_tokens(
        models["memory"], test, tokenizer.start_token, tokenizer, helped, capacity=capacity
    )
    seconds = time.monotonic() - start_s
    return _Evaluation(cache_only, memory, differences, examples, seconds)


def _collect(
    config: Config, seed: int, trained: dict[str, TrainingResult], found: _Evaluation
) -> dict[str, Any]:
    results = {"cache_only": found.cache_only, **found.memory}
    intervals = {name: list(d.perplexity_interval) for name, d in found.differences.items()}
    train_s = sum(result.seconds for result in trained.values())
    return {
        "perplexity": {name: result.perplexity for name, result in results.items()},
        "bits_per_byte": {name: result.bits_per_byte for name, result in results.items()},
        "change": {name: d.perplexity_change for name, d in found.differences.items()},
        "interval": intervals[str(max(config.evaluation.capacities))],
        "intervals": intervals,
        "train_s": train_s,
        "evaluate_s": found.evaluate_s,
        "tokens_per_s": sum(result.tokens for result in trained.values()) / train_s,
        "by_model": {
            name: {
                "train_s": result.seconds,
                "tokens": result.tokens,
                "tokens_per_s": result.tokens / result.seconds,
            }
            for name, result in trained.items()
        },
        "seed": seed,
        "test_documents": [document.name for document in found.cache_only.documents],
        "test_tokens": found.cache_only.tokens,
        "examples": [example.to_dict() for example in found.examples],
        "config": config.to_dict(),
    }
