"""The demo's numbers over several seeds: initial weights and order of documents.

    python experiments/demo_seeds.py                          # seeds 0, 1, 2, the whole recipe
    python experiments/demo_seeds.py --recipe runs/demo/memory/config.toml    # what a demo chose

A seed whose folder in `--runs` holds a result is not run again, so that the script goes on where
it stopped; another recipe needs another folder.
The table and the JSON hold the change of perplexity from the cache-only model of the same seed,
with its 95% interval.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from memorizing.demo import run_demo
from memorizing.storage.files import write_json


def main() -> None:
    """Run what is missing, then collect."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--recipe", default="demo")
    parser.add_argument("--runs", type=Path, default=Path("runs/demo_seeds"))
    parser.add_argument("--json", type=Path, default=None)
    arguments = parser.parse_args()
    results: dict[int, dict[str, Any]] = {}
    for seed in arguments.seeds:
        folder = arguments.runs / f"seed{seed}"
        path = folder / "result.json"
        if not path.exists():
            run_demo(seed=seed, minutes=0, recipe=arguments.recipe, run_dir=folder)
        if not path.exists():
            return  # stopped by Ctrl-C
        results[seed] = json.loads(path.read_text(encoding="utf-8"))
    show(results)
    if arguments.json is not None:
        write_json(arguments.json, collect(results))


def collect(results: dict[int, dict[str, Any]]) -> dict[str, Any]:
    """What is published of each seed."""
    keys = ("perplexity", "bits_per_byte", "change", "intervals", "by_model", "test_tokens")
    return {f"seed {seed}": {key: result[key] for key in keys} for seed, result in results.items()}


def show(results: dict[int, dict[str, Any]]) -> None:
    """A line for each memory, a column for each seed."""
    table = Table(title="perplexity, and its change from cache only (95% interval)")
    table.add_column("memory")
    for seed in results:
        table.add_column(f"seed {seed}", justify="right")
    for name in next(iter(results.values()))["perplexity"]:
        cells = []
        for result in results.values():
            cell = f"{result['perplexity'][name]:.3f}"
            if name in result["change"]:
                low, high = result["intervals"][name]
                cell += f"  {result['change'][name]:+.1%} ({low:+.1%} to {high:+.1%})"
            cells.append(cell)
        table.add_row(name, *cells)
    Console().print(table)


if __name__ == "__main__":
    main()
