"""Runs one job: trains, evaluates, writes its result. Goes on where it was stopped."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from jobs import Evaluation, Job

from memorizing.benchmark.machine import describe_machine
from memorizing.config import Config, load_config
from memorizing.data import (
    TokenizedDocument,
    cut_documents,
    load_tokenizer,
    tokenize_documents,
)
from memorizing.evaluation import EvaluationResult, evaluate_documents
from memorizing.files import write_json
from memorizing.metrics import POSITION_EDGES
from memorizing.training import (
    TokenizedCorpus,
    choose_precision,
    load_model,
    make_display,
    prepare_corpus,
    read_metrics,
    train,
)

RECIPES = Path(__file__).parent.parent / "recipes"
BLOCK_LEN = 1024
"""Nats are published as sums over blocks of so many tokens: enough for paired intervals."""


def load_job_config(job: Job, runs: Path) -> Config:
    """The whole configuration of a job."""
    config = load_config(str(RECIPES / f"{job.family}.toml"))
    settings = [f"training.seed={job.seed}", *job.settings]
    if job.start_from:
        settings.append(f"training.start_from={runs / job.start_from}")
    return replace(config.replace(settings), name=job.name)


def run_job(job: Job, runs: Path, results: Path) -> bool:
    """Do what is missing of a job; False where it was interrupted."""
    config = load_job_config(job, runs)
    corpus = _prepare_corpus(job, config, runs)
    run_dir = runs / job.name
    if job.trains and not (run_dir / "trained.json").exists():
        resume = (run_dir / "config.toml").exists()
        result = train(config, run_dir, resume=resume, corpus=corpus)
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
    model_dir = run_dir if job.trains else runs / job.start_from
    measured = _measure(job, config, corpus, model_dir, run_dir)
    described = _describe(job, config, model_dir) | {"evaluations": measured}
    write_json(results / f"{job.name}.json", described)
    return True


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
    """Every evaluation by name; each is kept in the run folder as soon as it is done."""
    path = run_dir / "evaluations.json"
    done: dict[str, dict[str, Any]] = json.loads(path.read_text()) if path.exists() else {}
    missing = [evaluation for evaluation in job.evaluations if evaluation.name not in done]
    if not missing:
        return done
    model = load_model(model_dir).model
    model.compute_dtype = choose_precision(config.training.precision, 0, 0, "cpu").dtype
    for evaluation in missing:
        model.config = replace(model.config, index=evaluation.index)
        result = evaluate_documents(
            model,
            take_beginnings(corpus, config, evaluation),
            corpus.tokenizer.start_token,
            capacity=evaluation.capacity,
            control=evaluation.control,  # type: ignore[arg-type]
            rows=config.evaluation.rows,
        )
        done[evaluation.name] = describe_evaluation(result, evaluation)
        write_json(path, done)
    return done


def take_beginnings(
    corpus: TokenizedCorpus, config: Config, evaluation: Evaluation
) -> list[TokenizedDocument]:
    """The first tokens of the held-out documents, with the bytes they stand for."""
    length = evaluation.max_tokens or config.evaluation.max_tokens_per_document
    documents = (
        corpus.validation
        if evaluation.use == "validation"
        else tokenize_documents(corpus.test, corpus.tokenizer)
    )
    return [
        cut_documents([document], corpus.tokenizer, length)[0]
        for document in documents
        if not evaluation.documents or document.name in evaluation.documents
    ]


def describe_evaluation(result: EvaluationResult, evaluation: Evaluation) -> dict[str, Any]:
    """Totals, by position, and nats in blocks, for JSON."""
    return {
        "capacity": evaluation.capacity,
        "control": evaluation.control,
        "index": evaluation.index,
        "use": evaluation.use,
        "max_tokens": evaluation.max_tokens or None,
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


def _describe(job: Job, config: Config, model_dir: Path) -> dict[str, Any]:
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
        "machine": describe_machine(),
        "num_weights": sessions[-1]["num_weights"],
        "training": {**trained, **_describe_curves(metrics)},
        "config": config.to_dict(),
    }


def _describe_curves(metrics: list[dict[str, Any]]) -> dict[str, Any]:
    """Nats per token against training tokens: while training, and of the validation documents."""
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
    return {"curve": _thin(curve), "validation": validation, "gates": gates}


def _thin(lines: list[dict[str, Any]], most: int = 100) -> list[dict[str, Any]]:
    every = -(-len(lines) // most) if lines else 1
    return lines[::every]
