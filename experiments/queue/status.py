"""How far a job is."""

from __future__ import annotations

import json
from pathlib import Path

from jobs import Job

from memorizing.training import read_metrics


def describe_progress(job: Job, runs: Path, results: Path, is_claimed: bool) -> tuple[str, str]:
    """A word and a detail."""
    result = results / f"{job.name}.json"
    run_dir = runs / job.name
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
        done = len(json.loads(evaluations.read_text())) if evaluations.exists() else 0
        return state, f"{done} of {len(job.evaluations)} evaluations"
    lines = read_metrics(metrics)
    return state, f"step {lines[-1]['step']}" if lines else "step 0"
