"""How far a job is."""

from __future__ import annotations

import json
from pathlib import Path

from jobs import Job

from memorizing.training import read_metrics


def is_done(job: Job, results: Path) -> bool:
    """Whether a job has a result, and of its present settings."""
    path = results / f"{job.name}.json"
    return path.exists() and json.loads(path.read_text())["settings"] == list(job.settings)


def can_be_started_from(job: Job, runs: Path, results: Path) -> bool:
    """Whether a job's weights are there, and not of other settings."""
    is_outdated = (results / f"{job.name}.json").exists() and not is_done(job, results)
    return (runs / job.name / "trained.json").exists() and not is_outdated


def describe_progress(job: Job, runs: Path, results: Path, is_claimed: bool) -> tuple[str, str]:
    """A word and a detail."""
    result = results / f"{job.name}.json"
    run_dir = runs / job.name
    if result.exists() and not is_done(job, results):
        settings = json.loads(result.read_text())["settings"]
        state = "running" if is_claimed else "outdated"
        return state, f"the result is of other settings: {' '.join(settings) or 'the recipe'}"
    if result.exists():
        found = json.loads(result.read_text())
        shown = [
            f"{name}: {values['perplexity']:.2f}" for name, values in found["evaluations"].items()
        ]
        return "done", ", ".join(shown)
    metrics = run_dir / "metrics.jsonl"
    if not metrics.exists():
        return ("running" if is_claimed else "waiting"), ""
    state = "running" if is_claimed else "stopped"
    evaluations = run_dir / "evaluations.json"
    if (run_dir / "trained.json").exists():
        kept = json.loads(evaluations.read_text()) if evaluations.exists() else {}
        done = sum(evaluation.name in kept for evaluation in job.evaluations)
        return state, f"{done} of {len(job.evaluations)} evaluations"
    lines = read_metrics(metrics)
    return state, f"step {lines[-1]['step']}" if lines else "step 0"
