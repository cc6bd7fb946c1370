"""Access by a threshold of the score instead of a count: an open question of the paper.

    python experiments/queue --run main/proofs-memory-seed0   # trains what is read here
    python experiments/thresholds.py                          # reads it with both kinds of access

A query reads its k nearest entries, near or not. Here it reads those among its nearest `--most`
whose score, the inner product of normalized query and key, reaches a threshold: one for all heads,
or one for each. Thresholds are those that validation documents reach as often, on average, as a
count asks for; where no entry reaches one, the query reads none. Test documents are then read both
ways, by a model that was trained with k = 32 and is not trained again.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from device_option import add_device_option
from held_out import load_documents
from rich.console import Console
from rich.table import Table
from torch import Tensor

from memorizing.benchmark.preparing import describe_machine
from memorizing.config import ModelConfig
from memorizing.data import TokenizedDocument
from memorizing.evaluation import EvaluationResult, compare_results, evaluate_documents
from memorizing.memory import Retrieved
from memorizing.model import MemorizingTransformer
from memorizing.model.block import Attention
from memorizing.storage.files import write_json
from memorizing.training import load_model, read_run_config

COUNTS = (2, 8, 32, 128)
EVERY = 16
"""Of so many queries one tells the thresholds."""


@dataclass
class Access:
    """Which of the nearest entries a query reads, and how many these were."""

    threshold: Tensor | None = None
    """(H,) in fp32; None reads all."""
    num_read: int = 0
    num_queries: int = 0
    num_without: int = 0
    """Queries that read nothing though there were entries."""
    num_full: int = 0
    """Queries that read as many as are searched for: a threshold may have let in more."""

    def choose(self, found: Retrieved) -> Retrieved:
        """What is read of what was found; counts it. In place."""
        neighbors = found.neighbors
        valid = neighbors.valid
        if self.threshold is not None:
            valid = valid & (neighbors.scores.float() >= self.threshold.view(-1, 1, 1))
        has_entries = neighbors.valid.any(-1)
        counts = valid.sum(-1)
        self.num_read += int(counts.sum())
        self.num_queries += int(has_entries.sum())
        self.num_without += int((has_entries & (counts == 0)).sum())
        self.num_full += int((counts == valid.shape[-1]).sum())
        scores = neighbors.scores.masked_fill(~valid, -torch.inf)
        return replace(found, neighbors=replace(neighbors, scores=scores, valid=valid))


class ChoosingAttention(Attention):
    """The model's own, reading what an `Access` lets it."""

    def __init__(self, config: ModelConfig, has_memory: bool, *, access: Access) -> None:
        """Make a layer as `Attention` does."""
        super().__init__(config, has_memory)
        self.access = access

    def _retrieve(self, *arguments: Any) -> Retrieved:
        return self.access.choose(super()._retrieve(*arguments))


def load_with(run: Path, num_neighbors: int, access: Access, device: torch.device):
    """A run's model, searching for so many entries; its tokenizer."""

    def make(config: ModelConfig) -> MemorizingTransformer:
        config = replace(config, num_neighbors=num_neighbors)
        return MemorizingTransformer(config, partial(ChoosingAttention, access=access))

    return load_model(run, device=device, make_model=make)


def find_thresholds(
    model: MemorizingTransformer,
    documents: Sequence[TokenizedDocument],
    start_token: int,
    counts: Sequence[int],
    **options: Any,
) -> tuple[list[Tensor], list[Tensor]]:
    """Scores that as many entries reach, on average, as each of the counts.

    Returns:
        Thresholds for all heads alike, and for each head, (H,) each, one for every count.
    """
    sampled: list[Tensor] = []

    def sample(output) -> None:
        for found in (output.retrievals or {}).values():
            scores, valid = (
                part[:, :, ::EVERY].transpose(0, 1).flatten(1, 2)
                for part in (found.scores.float(), found.valid)
            )
            # Queries whose memory holds fewer would tell thresholds that are too low.
            sampled.append(scores[:, valid.all(-1).all(0)])

    evaluate_documents(model, documents, start_token, on_output=sample, **options)
    scores = torch.cat(sampled, 1)
    num_heads, num_queries, _ = scores.shape
    ordered = scores.flatten(1).sort(-1, descending=True).values
    together = scores.flatten().sort(descending=True).values
    alike = [together[num_heads * num_queries * c - 1].expand(num_heads) for c in counts]
    return alike, [ordered[:, num_queries * c - 1] for c in counts]


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Both kinds of access at every count."""
    config = read_run_config(options.run)
    counts = [count for count in COUNTS if count < options.most]
    wide = load_with(options.run, options.most, Access(), options.device)
    tokenizer = wide.tokenizer
    assert tokenizer is not None
    reading: dict[str, Any] = {"capacity": options.capacity, "rows": options.rows}
    chosen_on, documents = (
        load_documents(config, tokenizer, options.tokens, use) for use in ("validation", "test")
    )
    start_token = tokenizer.start_token
    alike, by_head = find_thresholds(wide.model, chosen_on, start_token, counts, **reading)
    results: dict[str, EvaluationResult] = {}
    rows: list[dict[str, Any]] = []

    def read(name: str, num_neighbors: int, counted: Access, **about: Any) -> None:
        model = load_with(options.run, num_neighbors, counted, options.device).model
        result = evaluate_documents(model, documents, start_token, **reading)
        results[name] = result
        rows.append(
            {
                **about,
                "read": counted.num_read / counted.num_queries,
                "read_nothing": counted.num_without / counted.num_queries,
                "read_all": counted.num_full / counted.num_queries,
                "nats_per_token": result.nats / result.tokens,
                "perplexity": result.perplexity,
            }
        )
        print(name, rows[-1], flush=True)

    for count in (*counts, options.most):
        read(f"count {count}", count, Access(), access="count", count=count)
    for kind, found in (("threshold", alike), ("threshold of each head", by_head)):
        for count, threshold in zip(counts, found, strict=True):
            access = Access(threshold.to(options.device))
            about = {"access": kind, "count": count, "threshold": threshold.tolist()}
            read(f"{kind} {count}", options.most, access, **about)
            change = compare_results(results[f"{kind} {count}"], results[f"count {count}"])
            rows[-1]["against_count"] = change.to_dict()
    return {
        "run": options.run.name,
        "capacity": options.capacity,
        "most": options.most,
        "tokens": options.tokens,
        "documents": [document.name for document in documents],
        "rows": rows,
        "machine": describe_machine(),
    }


def main() -> None:
    """Measure, print, and write the JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--run", type=Path, default=Path("runs/experiments/main/proofs-memory-seed0")
    )
    parser.add_argument("--capacity", type=int, default=8192)
    parser.add_argument("--most", type=int, default=256, help="entries searched for")
    parser.add_argument("--tokens", type=int, default=24_576, help="of each document")
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--json", type=Path, default=Path("experiments/results/thresholds.json"))
    add_device_option(parser)
    options = parser.parse_args()
    values = measure(options)
    show(values)
    write_json(options.json, values)


def show(values: dict[str, Any]) -> None:
    """A line for each kind and count."""
    table = Table("access", "asked for", "read", "queries without", "perplexity", "against a count")
    for row in values["rows"]:
        change = row.get("against_count", {})
        parts = [change.get(f"perplexity_{name}") for name in ("change", "low", "high")]
        table.add_row(
            row["access"],
            f"{row['count']}",
            f"{row['read']:.1f}",
            f"{row['read_nothing']:.1%}",
            f"{row['perplexity']:.3f}",
            "{:+.1%} ({:+.1%} to {:+.1%})".format(*parts) if change else "",
        )
    Console().print(table)


if __name__ == "__main__":
    main()
