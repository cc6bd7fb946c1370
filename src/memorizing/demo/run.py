"""Train with memory and without, evaluate both on unseen source code, and say what it means."""

from __future__ import annotations

import shutil
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from rich.console import Console

from memorizing.analysis import (
    describe_reach,
    explain_helped_tokens,
    find_helped_tokens,
    make_result_table,
    plot_capacities,
    render_examples,
    trace_document,
)
from memorizing.benchmark.preparing import DTYPES
from memorizing.config import load_config
from memorizing.data import tokenize_documents
from memorizing.demo import story
from memorizing.demo.choice import NUM_EXAMPLES, READ_AGAIN, choose_work
from memorizing.demo.probe import measure_speed
from memorizing.devices import find_device
from memorizing.errors import ConfigError, RunFolderError
from memorizing.run_report import report_run
from memorizing.storage.files import write_bytes, write_json
from memorizing.terminal import make_display, show_progress
from memorizing.training import (
    TrainingResult,
    load_model,
    prepare_corpus,
    train,
)

_MARK = "demo.json"
"""A folder that holds this file is a demo's, and may be replaced by the next."""


def run_demo(
    *,
    seed: int = 0,
    minutes: float = 10.0,
    run_dir: Path | str = Path("runs/demo"),
    recipe: str | Path = "demo",
    console: Console | None = None,
) -> dict[str, Any]:
    """Show on real source code what a memory is worth, in the time that is given.

    Two models with the same weights at the start read the same tokens in the same order, one with
    memory and one with the Transformer-XL cache only. Both are evaluated on documents that neither
    saw.

    Args:
        seed: of the initial weights and the order of documents.
        minutes: for everything: a few steps are timed, and as much of the recipe is trained and
            evaluated as ends by then. 0 is the whole recipe, however long it takes.
        run_dir: replaced if an earlier demo made it.
        recipe: a recipe that holds test documents out. `memory/config.toml` of an earlier demo's
            folder, with 0 minutes, repeats it.
        console: where the story is told; by default standard output.

    Returns:
        What `result.json` holds: `perplexity` and `bits_per_byte` (by `cache_only`, each capacity,
        `off`, `other_document`, `shuffled`); `change`, relative, of perplexity from cache only, and
        its 95% `intervals`, by the same names; `interval`, that of the largest capacity; `train_s`,
        `evaluate_s`, `total_s` and, as `expected`, what the first two were expected to be;
        `tokens_per_s` (of training, both models), `by_model`, `examples`, the machine's `speed`
        and, in `config`, all settings, with what was chosen. Empty after Ctrl-C.

    Raises:
        RunFolderError: the folder holds something else than a demo.
        ConfigError: a recipe without a memory, or with fewer than two test documents.
    """
    begin_s = time.monotonic()
    run_dir = Path(run_dir)
    console = console or Console()
    config = load_config(recipe).replace([f"training.seed={seed}"])
    if not config.model.has_memory or len(config.data.test) < 2:
        raise ConfigError(
            f"the demo cannot run {recipe}: it needs a model with a memory (model.capacity) and "
            "two or more test documents (data.test)"
        )
    clear_folder(run_dir)
    console.print(story.introduce(config))

    corpus = prepare_corpus(config, make_display())
    tokenizer = corpus.tokenizer
    test = tokenize_documents(corpus.test, tokenizer)
    device = find_device()
    speed = measure_speed(config, device)
    left_s = max(0.0, 60 * minutes - (time.monotonic() - begin_s)) if minutes else None
    lengths = [len(document.tokens) for document in test]
    choice = choose_work(config, lengths, speed, left_s)
    num_train = sum(len(document.tokens) for document in corpus.train)
    console.print(story.announce(config, choice, num_train, lengths, speed, minutes))
    config = choice.config

    arms = {"cache_only": 0, "memory": config.model.capacity}
    trained: dict[str, TrainingResult] = {}
    for number, (name, capacity) in enumerate(arms.items(), start=1):
        console.print(story.title_training(number, name))
        arm = replace(config, name=f"demo-{name}", model=replace(config.model, capacity=capacity))
        trained[name] = train(arm, run_dir / name, device=device, corpus=corpus)
        if trained[name].interrupted:
            console.print("Stopped. Run it again to start over; it will replace this folder.")
            return {}

    console.print(story.title_evaluation(config, test))
    start_s = time.monotonic()
    with show_progress("evaluating") as progress:
        report = report_run(
            run_dir / "memory",
            use="test",
            against=run_dir / "cache_only",
            precision=speed.precision,
            device=device,
            progress=progress,
        )
    results, cache_only, differences = report.results, report.baseline, report.differences
    assert cache_only is not None
    model = load_model(run_dir / "memory", device=device).model
    model.compute_dtype = DTYPES[speed.precision]
    capacity = max(config.evaluation.capacities)
    helped = find_helped_tokens(
        results[str(capacity)],
        cache_only,
        test,
        tokenizer,
        num_tokens=NUM_EXAMPLES,
        min_position=config.model.segment_len,
        max_position=READ_AGAIN,
    )
    traces = {}
    for index in {token.document for token in helped}:
        last = max(token.position for token in helped if token.document == index)
        traces[index] = trace_document(
            model, test[index], tokenizer.start_token, capacity, max_tokens=last + 1
        )
    examples = explain_helped_tokens(traces, test, tokenizer, helped)
    evaluate_s = time.monotonic() - start_s
    baseline: dict[str, Any] = {"baseline": cache_only, "baseline_name": "cache only"}
    console.print(make_result_table(results, differences=differences, **baseline))
    reach = describe_reach(results)
    if reach:
        console.print(reach, highlight=False)
    console.print(story.conclude(cache_only, results, differences))
    console.print(story.title_examples())
    console.print(render_examples(examples, baseline_name="cache only"))

    intervals = {name: list(d.perplexity_interval) for name, d in differences.items()}
    train_s = sum(arm.seconds for arm in trained.values())
    measured = {"cache_only": cache_only, **results}
    result = {
        "perplexity": {name: one.perplexity for name, one in measured.items()},
        "bits_per_byte": {name: one.bits_per_byte for name, one in measured.items()},
        "change": {name: d.perplexity_change for name, d in differences.items()},
        "interval": intervals[str(capacity)],
        "intervals": intervals,
        "train_s": train_s,
        "evaluate_s": evaluate_s,
        "total_s": time.monotonic() - begin_s,
        "expected": {"train_s": choice.train_s, "evaluate_s": choice.evaluate_s},
        "speed": asdict(speed),
        "tokens_per_s": sum(arm.tokens for arm in trained.values()) / train_s,
        "by_model": {
            name: {
                "train_s": arm.seconds,
                "tokens": arm.tokens,
                "tokens_per_s": arm.tokens / arm.seconds,
            }
            for name, arm in trained.items()
        },
        "seed": seed,
        "test_documents": [document.name for document in cache_only.documents],
        "test_tokens": cache_only.tokens,
        "examples": [example.to_dict() for example in examples],
        "config": config.to_dict(),
    }
    plot_capacities(
        results,
        run_dir / "perplexity.png",
        title="Unseen source code: perplexity against the size of the memory",
        **baseline,
    )
    write_json(run_dir / "result.json", result)
    said, commands = story.point_to(run_dir, result["total_s"], train_s, evaluate_s)
    console.print(said)
    console.print(commands, soft_wrap=True)
    return result


def check_folder(run_dir: Path) -> None:
    """Refuse a folder that is not a demo's.

    Raises:
        RunFolderError: with what to do.
    """
    is_used = run_dir.exists() and (not run_dir.is_dir() or any(run_dir.iterdir()))
    if is_used and not (run_dir / _MARK).is_file():
        raise RunFolderError(
            f"{run_dir} exists and was not made by a demo; move it away, or run the demo elsewhere"
        )


def clear_folder(run_dir: Path) -> None:
    """Remove an earlier demo, and mark the folder as one.

    Raises:
        RunFolderError: the folder is not a demo's.
    """
    check_folder(run_dir)
    if run_dir.exists():
        shutil.rmtree(run_dir)
    run_dir.mkdir(parents=True, exist_ok=True)
    write_bytes(run_dir / _MARK, b'{"made_by": "memorizing demo"}\n')
