"""Runs one job: trains, evaluates, writes its result. Goes on where it was stopped."""

from __future__ import annotations

import json
import statistics
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from jobs import Evaluation, Job

from memorizing.benchmark.preparing import describe_machine
from memorizing.config import Config, load_config
from memorizing.data import (
    TokenizedDocument,
    load_tokenizer,
    take_beginnings,
    tokenize_documents,
)
from memorizing.devices import find_device
from memorizing.errors import ConfigError
from memorizing.evaluation import EvaluationResult, evaluate_documents
from memorizing.metrics import POSITION_EDGES
from memorizing.storage.files import write_json
from memorizing.training import (
    TokenizedCorpus,
    load_model,
    make_display,
    prepare_corpus,
    read_metrics,
    train,
)
from memorizing.training.run_folder import (
    read_run_config,
    read_sessions,
    read_trained_dtype,
    record,
)

EXPERIMENTS = Path(__file__).resolve().parent.parent
sys.path.append(str(EXPERIMENTS))

from attentions import choose_model, split_settings  # noqa: E402

RECIPES = EXPERIMENTS / "recipes"
BLOCK_LEN = 1024
"""Nats are published as sums over blocks of so many tokens: enough for paired intervals."""
DEVICE = find_device()
MACHINE = describe_machine()
"""Taken with the code: a commit that comes while a worker runs is not what it ran."""


def load_job_config(job: Job, runs: Path) -> Config:
    """The whole configuration of a job; that of another attention is in the description."""
    config = load_config(str(RECIPES / f"{job.family}.toml"))
    of_attention, others = split_settings(job.settings)
    settings = [f"training.seed={job.seed}", *others]
    if job.start_from:
        settings.append(f"training.start_from={runs / job.start_from}")
    description = "; ".join([config.description, *of_attention])
    return replace(config.replace(settings), name=job.name, description=description)


def run_job(job: Job, runs: Path, results: Path) -> bool:
    """Do what is missing of a job; False where it was interrupted.

    Raises:
        ConfigError: the run folder holds a training with other settings.
    """
    config = load_job_config(job, runs)
    run_dir = runs / job.name
    model_dir = run_dir if job.trains else runs / job.start_from
    check_settings(job, config, model_dir)
    corpus = _prepare_corpus(job, config, runs)
    if job.trains and not (run_dir / "trained.json").exists():
        resume = (run_dir / "config.toml").exists()
        num_sessions = len(read_sessions(run_dir))
        make_model = choose_model(job.settings)
        result = train(config, run_dir, resume=resume, corpus=corpus, make_model=make_model)
        # A session that had no step left to take is none.
        if len(read_sessions(run_dir)) > num_sessions:
            record(run_dir, {"commit": MACHINE["commit"]})
        if result.interrupted:
            return False
        trained = {
            "steps": result.steps,
            "tokens": result.tokens,
            "seconds": result.seconds,
            "train_nats": result.train_nats,
        }
        write_json(run_dir / "trained.json", trained)
    run_dir.mkdir(parents=True, exist_ok=True)
    measured = _measure(job, config, corpus, model_dir, run_dir)
    described = _describe(job, model_dir) | {"evaluations": measured}
    write_json(results / f"{job.name}.json", described)
    return True


def check_settings(job: Job, config: Config, model_dir: Path) -> None:
    """Refuse a run folder whose training has other settings than the job now; none is fine.

    Raises:
        ConfigError: names the settings.
    """
    if not (model_dir / "config.toml").exists():
        return
    before = read_run_config(model_dir)
    old, new = (_flatten(c.to_dict()) for c in (before, config))
    # The vocabulary is measured; the folder of all runs may have moved; a job that only measures
    # has the settings of the one it measures, which started from nothing.
    ignored = {"model.vocab_size"}
    start = "training.start_from"
    if not job.trains or (job.start_from and old[start].endswith(f"/{job.start_from}")):
        ignored.add(start)
    changed = [
        f"{key} was {old[key]!r} and is {new[key]!r}"
        for key in new
        if new[key] != old[key] and key not in ignored
    ]
    of_attention, _ = split_settings(job.settings)
    if of_attention and not before.description.endswith("; ".join(of_attention)):
        changed.append(f"{before.description!r} is now {config.description!r}")
    if changed:
        raise ConfigError(
            f"{model_dir} holds a training with other settings than {job.name} has now: "
            f"{'; '.join(changed)}; remove the folder to train again"
        )


def _flatten(values: dict[str, Any]) -> dict[str, Any]:
    """Settings as `table.key`; name and description are in no table."""
    tables = {name: table for name, table in values.items() if isinstance(table, dict)}
    return {f"{name}.{key}": v for name, table in tables.items() for key, v in table.items()}


def _prepare_corpus(job: Job, config: Config, runs: Path) -> TokenizedCorpus:
    """The corpus of a family, by one tokenizer for all its jobs."""
    folder = runs / "tokenizers" / f"{job.family}-{config.tokenizer.vocab_size}"
    known = load_tokenizer(folder) if (folder / "tokenizer.json").exists() else None
    corpus = prepare_corpus(config, make_display(False), known)
    if known is None:
        folder.mkdir(parents=True, exist_ok=True)
        corpus.tokenizer.save(folder)
    return corpus


def _measure(
    job: Job, config: Config, corpus: TokenizedCorpus, model_dir: Path, run_dir: Path
) -> dict[str, dict[str, Any]]:
    """Planned evaluations by name; each is kept in the run folder as soon as it is done."""
    path = run_dir / "evaluations.json"
    done: dict[str, dict[str, Any]] = json.loads(path.read_text()) if path.exists() else {}
    missing = [e for e in job.evaluations if not is_kept(e, done.get(e.name))]
    if not missing:
        return {evaluation.name: done[evaluation.name] for evaluation in job.evaluations}
    model = load_model(model_dir, device=DEVICE, make_model=choose_model(job.settings)).model
    model.compute_dtype = read_trained_dtype(model_dir)
    for evaluation in missing:
        model.config = replace(model.config, index=evaluation.index)
        result = evaluate_documents(
            model,
            choose_beginnings(corpus, config, evaluation),
            corpus.tokenizer.start_token,
            capacity=evaluation.capacity,
            control=evaluation.control,  # type: ignore[arg-type]
            rows=config.evaluation.rows,
        )
        done[evaluation.name] = describe_evaluation(result, evaluation)
        write_json(path, done)
    return {evaluation.name: done[evaluation.name] for evaluation in job.evaluations}


def is_kept(evaluation: Evaluation, kept: dict[str, Any] | None) -> bool:
    """Whether what is kept under the name of an evaluation is of all of its settings."""
    if kept is None:
        return False
    # Files of before these two were written hold readings of all documents, as long as usual.
    found = {"max_tokens": None, "only_documents": [], **kept}
    return all(found[key] == value for key, value in _describe_reading(evaluation).items())


def _describe_reading(evaluation: Evaluation) -> dict[str, Any]:
    return {
        "capacity": evaluation.capacity,
        "control": evaluation.control,
        "index": evaluation.index,
        "use": evaluation.use,
        "max_tokens": evaluation.max_tokens or None,
        "only_documents": list(evaluation.documents),
    }


def choose_beginnings(
    corpus: TokenizedCorpus, config: Config, evaluation: Evaluation
) -> list[TokenizedDocument]:
    """The first tokens of the held-out documents, with the bytes they stand for."""
    length = evaluation.max_tokens or config.evaluation.max_tokens_per_document
    documents = (
        corpus.validation
        if evaluation.use == "validation"
        else tokenize_documents(corpus.test, corpus.tokenizer)
    )
    chosen = [d for d in documents if not evaluation.documents or d.name in evaluation.documents]
    return take_beginnings(chosen, corpus.tokenizer, length)


def describe_evaluation(result: EvaluationResult, evaluation: Evaluation) -> dict[str, Any]:
    """Totals, by position, and nats in blocks, for JSON."""
    return {
        **_describe_reading(evaluation),
        "perplexity": result.perplexity,
        "bits_per_byte": result.bits_per_byte,
        "nats": result.nats,
        "tokens": result.tokens,
        "bytes": result.bytes,
        "by_position": [
            {"start": b.start, "end": b.end, "nats": b.nats, "tokens": b.tokens}
            for b in result.by_position(POSITION_EDGES)
        ],
        "documents": [
            {
                "name": document.name,
                "tokens": len(document.token_nats),
                "block_nats": sum_blocks(document.token_nats),
            }
            for document in result.documents
        ],
    }


def sum_blocks(token_nats: np.ndarray) -> list[float]:
    """Nats of each block of `BLOCK_LEN` tokens; the last may be shorter."""
    starts = np.arange(0, len(token_nats), BLOCK_LEN)
    sums = np.add.reduceat(token_nats.astype(np.float64), starts)
    return [round(float(value), 2) for value in sums]


def _describe(job: Job, model_dir: Path) -> dict[str, Any]:
    metrics = read_metrics(model_dir / "metrics.jsonl")
    trained = json.loads((model_dir / "trained.json").read_text())
    sessions = json.loads((model_dir / "run.json").read_text())["sessions"]
    return {
        "job": job.name,
        "experiment": job.experiment,
        "family": job.family,
        "arm": job.arm,
        "seed": job.seed,
        "settings": list(job.settings),
        "start_from": job.start_from or None,
        "trains": job.trains,
        "command": f"python experiments/queue --run '{job.name}'",
        "commits": sorted({session["commit"] or "unknown" for session in sessions}),
        "evaluation_commit": MACHINE["commit"],
        "machine": MACHINE,
        "num_weights": sessions[-1]["num_weights"],
        "precision": sessions[-1]["precision"],
        "training": {**trained, **_describe_curves(metrics)},
        "config": read_run_config(model_dir).to_dict(),
    }


def _describe_curves(metrics: list[dict[str, Any]]) -> dict[str, Any]:
    """Nats per token against training tokens, in training and of the validation documents; speed.

    The speed is the median over the windows of the log: pauses and other work count little.
    """
    tokens = {line["step"]: line["train"]["tokens"] for line in metrics if "train" in line}
    curve = [
        {"tokens": line["train"]["tokens"], "nats_per_token": line["train"]["nats_per_token"]}
        for line in metrics
        if "train" in line
    ]
    validation = [
        {
            "tokens": tokens[line["step"]],
            "nats_per_token": line["validation"]["nats_per_token"],
            "capacity": line["validation"]["capacity"],
            "validation_tokens": line["validation"]["tokens"],
        }
        for line in metrics
        if "validation" in line
    ]
    gates = next((m["train"]["gate"] for m in reversed(metrics) if "train" in m), {})
    speeds = [line["train"]["tokens_per_s"] for line in metrics if "train" in line]
    return {
        "tokens_per_s": statistics.median(speeds) if speeds else None,
        "curve": _thin(curve),
        "validation": validation,
        "gates": gates,
    }


def _thin(lines: list[dict[str, Any]], most: int = 100) -> list[dict[str, Any]]:
    every = -(-len(lines) // most) if lines else 1
    return lines[::every]
