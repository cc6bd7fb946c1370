r"""What memory retrieves, from how far, and whether that defines the name (paper, Table 8).

    python experiments/lookups.py runs/demo/memory --use test --max-tokens 16384
    python experiments/lookups.py runs/experiments/main/{proofs,code}-memory-seed0 \
        --max-tokens 16384 --json experiments/results/lookups.json

Runs that the JSON has are kept, also where their weights are gone.

Reads documents of runs with their memory and without. Of all nats that memory saves it says how
many are saved by what distance of the place that all heads together weighed most, by what class of
token, and by how often the token was there before. Of every token of a name that memory made at
least twice as likely, while a definition of the name could be retrieved, it asks whether that place
lies in the definition; beside it the newest exact match of the token before, and chance. 95%
intervals draw documents, and names in each.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from memorizing.analysis import find_uses, inspect_run, rate_lookups
from memorizing.analysis.inspection import Inspection, Row
from memorizing.benchmark.preparing import describe_machine
from memorizing.data import load_splits
from memorizing.storage.files import write_json
from memorizing.training import load_model, read_run_config

KINDS = {
    "distances": Inspection.count_distances,
    "classes": Inspection.count_classes,
    "earlier": Inspection.count_earlier,
}


def sum_rows(documents: Iterable[Sequence[Row]]) -> list[dict[str, Any]]:
    """Rows of the same name summed over documents, with their shares of tokens and of nats saved.

    Names keep the order of their classes: that of the document that has most of them, and others
    behind.
    """
    tables = sorted(documents, key=len, reverse=True)
    tokens: dict[str, int] = {}
    saved: dict[str, float] = {}
    for row in [row for table in tables for row in table]:
        tokens[row.name] = tokens.get(row.name, 0) + row.tokens
        saved[row.name] = saved.get(row.name, 0.0) + row.gain * row.tokens
    num, total = sum(tokens.values()), sum(saved.values())
    return [
        {
            "name": name,
            "tokens": count,
            "share_of_tokens": count / num,
            "nats_saved_per_token": saved[name] / count,
            "share_of_saved": saved[name] / total,
        }
        for name, count in tokens.items()
    ]


def measure(run: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Everything about one run."""
    loaded, start_s = load_model(run), time.monotonic()
    assert loaded.tokenizer is not None, "a run without a tokenizer has no names"
    config = read_run_config(run)
    documents = getattr(load_splits(config.data), options.use)[: options.documents or None]
    texts, num_tokens = [], 0
    rows: dict[str, list[list[Row]]] = {kind: [] for kind in KINDS}
    for document in documents:
        found = inspect_run(
            loaded.model,
            loaded.tokenizer,
            document,
            name=str(run),
            max_tokens=options.max_tokens,
        )
        texts.append(find_uses(found))
        num_tokens += found.trace.num_tokens
        for kind, count in KINDS.items():
            rows[kind].append(count(found))
        print(f"{document.name}: {len(texts[-1]):,} tokens of names", flush=True)
    return {
        "name": config.name,
        "capacity": config.model.capacity,
        "documents": len(texts),
        "tokens": num_tokens,
        "lookups": [dataclasses.asdict(one) for one in rate_lookups(texts)],
        **{kind: sum_rows(found) for kind, found in rows.items()},
        "seconds": round(time.monotonic() - start_s),
        "machine": describe_machine(),
    }


def main() -> None:
    """Print and write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("runs", type=Path, nargs="+", help="folders of runs with memory")
    parser.add_argument("--use", choices=("validation", "test"), default="test")
    parser.add_argument("--documents", type=int, default=0, help="only the first; 0 is all")
    parser.add_argument("--max-tokens", type=int, default=0, help="of each document; 0 is all")
    parser.add_argument("--json", type=Path, default=None)
    options = parser.parse_args()
    read = {"use": options.use, "max_tokens": options.max_tokens}
    found = load_kept(options.json, read)
    for run in options.runs:
        values = measure(run, options)
        found[values["name"]] = values
        print(json.dumps(values, indent=1), flush=True)
        if options.json is not None:
            write_json(options.json, {**read, "runs": found})


def load_kept(path: Path | None, read: dict[str, Any]) -> dict[str, Any]:
    """Runs that a file has, by name; none where it has read other documents or lengths."""
    if path is None or not path.is_file():
        return {}
    kept = json.loads(path.read_text(encoding="utf-8"))
    return kept["runs"] if {name: kept[name] for name in read} == read else {}


if __name__ == "__main__":
    main()
