"""Stale memory: entries written by weights n steps old, read by the present ones.

    python experiments/queue --run staleness      # trains the two models, keeping checkpoints
    python experiments/staleness.py               # reads with every pair of checkpoints

While a model trains, the entries in its memory are as old as the memory is long: with 8,192 entries
and segments of 512 the oldest were written 16 steps ago, with 65,536 entries 128 steps ago. Here a
document is read by the weights of a checkpoint with a memory that an earlier checkpoint wrote.
What is reported: perplexity, the cosine between the keys that both write for the same token, and
the ratio of their norms; with normalized queries and keys, and without.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from device_option import add_device_option
from held_out import load_documents, make_inputs
from rich.console import Console
from rich.table import Table
from torch import Tensor

from memorizing.benchmark.preparing import describe_machine
from memorizing.data import TokenizedDocument
from memorizing.loss import compute_token_nats
from memorizing.model import MemorizingTransformer, evaluation_mode
from memorizing.storage.files import write_json
from memorizing.training import list_checkpoints, load_model, read_run_config
from memorizing.training.checkpoint import read_step

MODELS = {"normalized": "proofs-normalized-seed0", "not normalized": "proofs-raw-seed0"}


@dataclass
class Drift:
    """Sums over all keys of a reading."""

    nats: float = 0.0
    num_tokens: int = 0
    cosine: float = 0.0
    norm_ratio: float = 0.0
    num_keys: int = 0

    def add_keys(self, old: Tensor, new: Tensor) -> None:
        """Compare keys (..., D) of the same tokens."""
        old, new = old.float(), new.float()
        self.cosine += float(torch.cosine_similarity(old, new, dim=-1).sum())
        self.norm_ratio += float((old.norm(dim=-1) / new.norm(dim=-1)).sum())
        self.num_keys += old.shape[:-1].numel()

    def to_dict(self) -> dict[str, float]:
        """Means, for JSON."""
        return {
            "perplexity": math.exp(self.nats / self.num_tokens),
            "nats_per_token": self.nats / self.num_tokens,
            "tokens": self.num_tokens,
            "key_cosine": self.cosine / self.num_keys,
            "key_norm_ratio": self.norm_ratio / self.num_keys,
        }


def read_with_stale_memory(
    reader: MemorizingTransformer,
    writer: MemorizingTransformer,
    documents: Sequence[TokenizedDocument],
    start_token: int,
) -> Drift:
    """Read documents with one model from a memory that the other writes."""
    drift = Drift()
    segment_len, device = reader.config.segment_len, reader.embedding.weight.device
    for document in documents:
        inputs, targets = (part.to(device) for part in make_inputs(document, start_token))
        states = [model.init_state(1) for model in (reader, writer)]
        for start in range(0, targets.shape[1], segment_len):
            part = slice(start, start + segment_len)
            outputs = [
                model(inputs[:, part], state)
                for model, state in zip((reader, writer), states, strict=True)
            ]
            nats = compute_token_nats(outputs[0].logits, targets[:, part])
            drift.nats += float(nats.sum())
            drift.num_tokens += nats.numel()
            written = outputs[1].state.staged
            for layer, entries in outputs[0].state.staged.items():
                drift.add_keys(written[layer].keys, entries.keys)
            states = [replace(outputs[0].state, staged=written).commit(), outputs[1].state.commit()]
    return drift


def measure(run_dir: Path, max_tokens: int, device: torch.device) -> dict[str, Any]:
    """All pairs of a run's checkpoints: the reader is not older than the writer."""
    config = read_run_config(run_dir)
    checkpoints = list_checkpoints(run_dir)
    models: dict[int, MemorizingTransformer] = {}
    tokenizer = None
    for checkpoint in checkpoints:
        loaded = load_model(checkpoint, device=device)
        loaded.model.compute_dtype = torch.bfloat16
        models[read_step(checkpoint)], tokenizer = loaded.model, loaded.tokenizer
    assert tokenizer is not None
    documents = load_documents(config, tokenizer, max_tokens)
    pairs = []
    for read_at, reader in models.items():
        for written_at, writer in models.items():
            if written_at > read_at:
                continue
            with evaluation_mode(reader), evaluation_mode(writer):
                drift = read_with_stale_memory(reader, writer, documents, tokenizer.start_token)
            pairs.append(
                {
                    "read_at": read_at,
                    "written_at": written_at,
                    "steps_old": read_at - written_at,
                    **drift.to_dict(),
                }
            )
    return {"capacity": config.model.capacity, "pairs": pairs, "config": config.to_dict()}


def main() -> None:
    """Measure, print, and write the JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--runs", type=Path, default=Path("runs/experiments/staleness"))
    parser.add_argument("--tokens", type=int, default=16_384, help="of each document")
    parser.add_argument("--json", type=Path, default=Path("experiments/results/staleness.json"))
    add_device_option(parser)
    arguments = parser.parse_args()
    models = {
        name: measure(arguments.runs / folder, arguments.tokens, arguments.device)
        for name, folder in MODELS.items()
    }
    show(models)
    write_json(arguments.json, {"models": models, "machine": describe_machine()})


def show(models: dict[str, dict[str, Any]]) -> None:
    """A line per pair."""
    table = Table("keys", "read at step", "steps old", "perplexity", "change", "cosine", "norms")
    for name, found in models.items():
        fresh = {p["read_at"]: p for p in found["pairs"] if p["steps_old"] == 0}
        for pair in found["pairs"]:
            change = pair["nats_per_token"] - fresh[pair["read_at"]]["nats_per_token"]
            table.add_row(
                name,
                str(pair["read_at"]),
                str(pair["steps_old"]),
                f"{pair['perplexity']:.2f}",
                f"{math.expm1(change):+.1%}",
                f"{pair['key_cosine']:.3f}",
                f"{pair['key_norm_ratio']:.2f}",
            )
    Console().print(table)


if __name__ == "__main__":
    main()
