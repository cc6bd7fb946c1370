"""What memory costs where a document begins: many spans of held-out documents, each read as one.

    python experiments/queue --run main/proofs main/code   # trains: cache only, with memory
    python experiments/document_starts.py --families proofs code --seeds 0

The first 512 tokens of a few documents are too few to say it. Here spans as long as the window are
drawn from all of each test document, and both models of a pair read each as a document of its own:
the memory is empty, as is the cache. Pairs that the JSON has are kept, also where their weights are
gone.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
from held_out import load_documents
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from memorizing.benchmark.preparing import describe_machine
from memorizing.data import TokenizedDocument
from memorizing.errors import MemorizingError
from memorizing.evaluation import evaluate_documents
from memorizing.metrics import compare_token_nats, compute_perplexity
from memorizing.storage.files import write_json
from memorizing.training import load_model, read_run_config
from memorizing.training.run_folder import read_trained_dtype

RESULTS = Path("experiments/results/document_starts.json")
ARMS = ("cache", "memory")
"""Arms of the queue's main experiment."""


def main(arguments: list[str] | None = None) -> int:
    """Measure the pairs that are asked for, print, write the JSON; status 2 after an error."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--families", nargs="+", default=["proofs", "code"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--spans", type=int, default=128, help="of all documents of a family")
    parser.add_argument("--use", choices=("validation", "test"), default="test")
    parser.add_argument(
        "--runs", type=Path, default=Path("runs/experiments"), help="where the queue trains"
    )
    parser.add_argument("--json", type=Path, default=RESULTS)
    options = parser.parse_args(arguments)
    kept = json.loads(options.json.read_text(encoding="utf-8")) if options.json.is_file() else {}
    pairs: dict[str, Any] = kept.get("pairs", {})
    try:
        for seed in options.seeds:
            for family in options.families:
                pairs[f"{family}-seed{seed}"] = measure_pair(options, family, seed)
                write_json(options.json, {"pairs": dict(sorted(pairs.items()))})
    except MemorizingError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    show(pairs)
    return 0


def measure_pair(options: argparse.Namespace, family: str, seed: int) -> dict[str, Any]:
    """Both models of a family and seed on the same spans, and their difference."""
    nats: dict[str, list[NDArray[np.floating]]] = {}
    num_spans = 0
    for arm in ARMS:
        run_dir = options.runs / "main" / f"{family}-{arm}-seed{seed}"
        config, loaded = read_run_config(run_dir), load_model(run_dir)
        loaded.model.compute_dtype = read_trained_dtype(run_dir)
        length = config.evaluation.max_tokens_per_document
        documents = load_documents(config, loaded.tokenizer, length, options.use)
        spans = [
            cut_spans(document, config.model.window, -(-options.spans // len(documents)))
            for document in documents
        ]
        read = [
            evaluate_documents(
                loaded.model,
                part,
                loaded.tokenizer.start_token,
                capacity=config.model.capacity,
                rows=config.evaluation.rows,
            )
            for part in spans
        ]
        nats[arm] = [np.concatenate([d.token_nats for d in result.documents]) for result in read]
        num_spans = sum(map(len, spans))
    span_len = sum(map(len, nats[ARMS[0]])) // num_spans
    change = compare_token_nats(nats["memory"], nats["cache"], block_len=span_len)
    per_token = {arm: float(np.concatenate(parts).mean()) for arm, parts in nats.items()}
    return {
        "use": options.use,
        "spans": num_spans,
        "span_len": span_len,
        "documents": len(nats["cache"]),
        "nats_per_token": per_token,
        "perplexity": {arm: compute_perplexity(value) for arm, value in per_token.items()},
        "change": change.to_dict(),
        "machine": describe_machine(),
    }


def cut_spans(document: TokenizedDocument, length: int, count: int) -> list[TokenizedDocument]:
    """At most `count` whole spans of a document, drawn by its number of tokens, in their order.

    Their bytes are not counted.
    """
    places = len(document.tokens) // length
    drawn = np.random.default_rng(len(document.tokens)).permutation(places)[:count]
    return [
        TokenizedDocument(
            f"{document.name} from {start}", document.tokens[start : start + length], 0
        )
        for start in sorted(int(place) * length for place in drawn)
    ]


def show(pairs: dict[str, Any]) -> None:
    """A line for each pair."""
    table = Table("pair", "spans", "cache alone", "memory", "change (95%)")
    for name, pair in pairs.items():
        change = pair["change"]
        ends = f"{change['perplexity_low']:+.1%} to {change['perplexity_high']:+.1%}"
        shown = (f"{pair['perplexity'][arm]:.2f}" for arm in ARMS)
        table.add_row(
            name, str(pair["spans"]), *shown, f"{change['perplexity_change']:+.1%} ({ends})"
        )
    Console().print(table)


if __name__ == "__main__":
    sys.exit(main())
