"""SmolLM2 without a memory on the test documents: what a memory is compared with.

    python experiments/pretrained/convert.py
    python experiments/corpora/build.py proofs code
    python experiments/pretrained/baselines.py                     # all; goes on where it stopped
    python experiments/pretrained/baselines.py --arms window-512   # some

Each document's first 32,768 tokens, from the first to the last, in fp32:

- `window-512`: a token sees itself and the 511 tokens before it;
- `window-512-start`: and the start token (`sliding.py` says why);
- `context-8192`: the native context: the start token and 7,680 tokens, so that no distance between
  two tokens is beyond 8,192, which the model was trained for.

Nats of every token go to `runs/pretrained/baselines`, for paired comparisons; sums to the JSON.
"""

from __future__ import annotations

import argparse
import shlex
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from command_line import make_parser, run_command
from documents import FAMILIES, TEST_TOKENS, ReadDocument, load_documents
from rich.console import Console
from rich.table import Table
from sliding import BLOCK_LEN, compute_window_nats
from smollm import CONTEXT_LEN, describe_precision, load_smollm
from transformers import LlamaForCausalLM

from memorizing.benchmark.preparing import describe_machine
from memorizing.metrics import Totals, bucket_by_position
from memorizing.storage.files import write_json

RESULTS = Path("experiments/results/pretrained_baselines.json")
NATS = Path("runs/pretrained/baselines")
BLOCK_SUM_LEN = 1024
"""Tokens of the blocks whose sums are kept: for an interval by block bootstrap."""


@dataclass(frozen=True)
class Arm:
    """What a token sees."""

    window: int
    keeps_start: bool


ARMS = {
    "window-512-start": Arm(512, True),
    "window-512": Arm(512, False),
    "context-8192": Arm(CONTEXT_LEN - BLOCK_LEN, True),
}


def main() -> int:
    """Measure what is not measured yet, print, and write the JSON."""
    parser = make_parser(__doc__)
    parser.add_argument("--arms", nargs="*", choices=list(ARMS), default=list(ARMS))
    parser.add_argument("--tokens", type=int, default=TEST_TOKENS, help="of each document")
    parser.add_argument("--threads", type=int, default=0, help="default: as torch has it")
    parser.add_argument("--nats", type=Path, default=NATS, help="folder; nats of every token")
    parser.add_argument("--json", type=Path, default=RESULTS)
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    return run_command(measure, options)


def measure(options: argparse.Namespace) -> None:
    """Every arm on every document; the JSON is written after each."""
    model, tokenizer = load_smollm(options.model, options.device)
    made_by = {"machine": describe_machine(), "command": shlex.join(["python", *sys.argv])}
    documents = {
        family: load_documents(
            family, "test", tokenizer, corpora=options.corpora, max_tokens=options.tokens
        )
        for family in FAMILIES
    }
    for name in options.arms:
        for family in FAMILIES:
            for document in documents[family]:
                path = options.nats / name / f"{document.name}.npy"
                read_document(model, document, ARMS[name], tokenizer.start_token, path)
                values = collect(documents, options.nats, SHOWN)
                write_json(options.json, values | made_by)
    show(collect(documents, options.nats, SHOWN))


def read_document(
    model: LlamaForCausalLM, document: ReadDocument, arm: Arm, start_token: int, path: Path
) -> None:
    """Write the nats of every token to a file, unless it is there."""
    if path.is_file() and len(np.load(path)) == len(document.tokens):
        return
    began, num_done = time.perf_counter(), 0

    def report(num_tokens: int) -> None:
        nonlocal num_done
        num_done += num_tokens
        if num_done % 4096 == 0 and num_done < len(document.tokens):
            speed = num_done / (time.perf_counter() - began)
            print(f"  {document.name}: {num_done:,} tokens, {speed:.0f} tokens/s", flush=True)

    nats = compute_window_nats(
        model,
        document.tokens,
        start_token,
        arm.window,
        keeps_start=arm.keeps_start,
        report=report,
    )
    speed = len(nats) / (time.perf_counter() - began)
    path.parent.mkdir(parents=True, exist_ok=True)
    np.save(path, nats)
    totals = Totals(float(nats.sum(dtype=np.float64)), len(nats), document.num_bytes)
    print(
        f"{path.parent.name} {document.name}: {totals.nats / totals.tokens:.4f} nats per token, "
        f"{totals.bits_per_byte:.4f} bits per byte, {speed:.0f} tokens/s",
        flush=True,
    )


SHOWN = {name: vars(arm) for name, arm in ARMS.items()}


def collect(
    documents: dict[Any, list[ReadDocument]], folder: Path, arm_settings: dict[str, dict[str, Any]]
) -> dict[str, Any]:
    """Numbers of all arms and documents whose nats are there.

    Args:
        documents: per family.
        folder: nats of every token, `ARM/DOCUMENT.npy`.
        arm_settings: per arm, what is said of it beside its numbers.
    """
    arms: dict[str, Any] = {}
    for name, settings in arm_settings.items():
        families: dict[str, Any] = {}
        for family, members in documents.items():
            total, by_document, token_nats = Totals(), {}, []
            for document in members:
                path = folder / name / f"{document.name}.npy"
                if not path.is_file():
                    continue
                nats = np.load(path)
                if len(nats) != len(document.tokens):
                    continue
                sums = np.add.reduceat(nats.astype(np.float64), range(0, len(nats), BLOCK_SUM_LEN))
                totals = Totals(float(sums.sum()), len(nats), document.num_bytes)
                total += totals
                token_nats.append(nats)
                by_document[document.name] = describe(totals) | {
                    "block_nats": [round(float(s), 3) for s in sums]
                }
            if by_document:
                families[family] = {
                    "total": describe(total),
                    "by_position": [vars(b) for b in bucket_by_position(token_nats)],
                    "documents": by_document,
                }
        if families:
            arms[name] = settings | families
    return {"precision": describe_precision(), "block_nats_len": BLOCK_SUM_LEN, "arms": arms}


def describe(totals: Totals) -> dict[str, Any]:
    """For JSON."""
    return {
        "nats": totals.nats,
        "tokens": totals.tokens,
        "bytes": totals.bytes,
        "nats_per_token": totals.nats / totals.tokens,
        "perplexity": totals.perplexity,
        "bits_per_byte": totals.bits_per_byte,
    }


def show(values: dict[str, Any]) -> None:
    """A line per arm and family, and one per document."""
    table = Table("arm", "documents", "tokens", "nats per token", "perplexity", "bits per byte")
    for name, arm in values["arms"].items():
        for family in (f for f in FAMILIES if f in arm):
            lines = {family: arm[family]["total"]} | arm[family]["documents"]
            for shown, line in lines.items():
                table.add_row(
                    name,
                    shown if shown == family else f"  {shown}",
                    f"{line['tokens']:,}",
                    f"{line['nats_per_token']:.4f}",
                    f"{line['perplexity']:.2f}",
                    f"{line['bits_per_byte']:.4f}",
                )
    Console().print(table)


if __name__ == "__main__":
    sys.exit(main())
