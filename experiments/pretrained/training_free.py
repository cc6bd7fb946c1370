"""SmolLM2 with a memory and nothing trained, on documents that neither it nor we have seen.

    python experiments/pretrained/convert.py
    python experiments/corpora/build.py proofs code
    python experiments/pretrained/training_free.py          # goes on where it stopped

`calibrate` chooses layers, heads and bias on the first tokens of one validation document per
family. Then every test document is read from its first token, 32,768 tokens, local window of 512
and the first four tokens:

- `window`: without memory;
- `memory`: with what it read of the same document;
- `other_document`, `shuffled`: controls, on the first tokens only: another document's memory, and
  the values of random entries. What is gained must be gone.

Nats of every token go to `runs/pretrained/training_free`, for paired comparisons; sums to the JSON.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from baselines import collect, show
from command_line import make_parser, run_command
from documents import FAMILIES, TEST_TOKENS, Family, ReadDocument, load_documents
from smollm import load_smollm

from memorizing import remove_memory
from memorizing.benchmark.preparing import describe_machine
from memorizing.data import Tokenizer
from memorizing.evaluation.pretrained import evaluate_model
from memorizing.huggingface.learning.calibration import EntryCalibration, calibrate
from memorizing.metrics import compare_token_nats
from memorizing.storage.files import write_json

RESULTS = Path("experiments/results/pretrained_training_free.json")
NATS = Path("runs/pretrained/training_free")
CALIBRATED_ON: dict[Family, str] = {"proofs": "hol_EC.txt", "code": "jinja2"}
CALIBRATION_TOKENS = 3072
CONTROL_TOKENS = 8192
CONTROLS = ("other_document", "shuffled")
ARMS = ("window", "memory", *CONTROLS)
MAX_LAYERS = 4
"""Each costs a search for every token; those that promise less gain little more."""


def main() -> int:
    """Measure what is not measured yet, print, and write the JSON."""
    parser = make_parser(__doc__)
    parser.add_argument("--arms", nargs="*", choices=ARMS, default=list(ARMS))
    parser.add_argument("--families", nargs="*", choices=FAMILIES, default=list(FAMILIES))
    parser.add_argument("--tokens", type=int, default=TEST_TOKENS, help="of each document")
    parser.add_argument("--documents", type=int, default=4, help="first test documents of a family")
    parser.add_argument(
        "--layers", type=int, default=MAX_LAYERS, help="at most so many read a memory"
    )
    parser.add_argument("--nats", type=Path, default=NATS, help="folder; nats of every token")
    parser.add_argument("--json", type=Path, default=RESULTS)
    options = parser.parse_args()
    return run_command(measure, options)


def measure(options: argparse.Namespace) -> None:
    """Every arm on every document; the JSON is written after each."""
    model, tokenizer = load_smollm(options.model, options.device)
    whole, begun = (
        {
            family: load_documents(
                family, "test", tokenizer, corpora=options.corpora, max_tokens=max_tokens
            )[: options.documents]
            for family in options.families
        }
        for max_tokens in (options.tokens, min(options.tokens, CONTROL_TOKENS))
    )
    read = {arm: begun if arm in CONTROLS else whole for arm in ARMS}
    found = {
        family: find_heads(
            model, tokenizer, family, options.corpora, options.nats, max_layers=options.layers
        )
        for family in options.families
    }
    for arm in options.arms:
        for family in options.families:
            restore_calibration(found[family]).add_to(model)
            read_arm(model, read[arm][family], tokenizer.start_token, arm, options.nats)
            remove_memory(model)
            report(options, whole, begun, found)
    show(report(options, whole, begun, found))


def report(
    options: argparse.Namespace,
    whole: dict[Family, list[ReadDocument]],
    begun: dict[Family, list[ReadDocument]],
    found: dict[Family, dict[str, Any]],
) -> dict[str, Any]:
    """Write all that is measured so far to the JSON."""
    of_texts = [arm for arm in ARMS if arm not in CONTROLS]
    values = collect(whole, options.nats, {arm: {} for arm in of_texts})
    values["arms"] |= collect(begun, options.nats, {arm: {} for arm in CONTROLS})["arms"]
    values |= {
        "changes": {arm: compare(arm, begun, options.nats) for arm in ("memory", *CONTROLS)},
        "calibration": found,
        "machine": describe_machine(),
        "command": shlex.join(["python", *sys.argv]),
    }
    write_json(options.json, values)
    for arm, families in values["changes"].items():
        for family, change in families.items():
            low, high = change["interval"]
            print(f"{arm}, {family}: {change['change']:+.1%} ({low:+.1%} to {high:+.1%})")
    return values


def compare(
    arm: str, documents: dict[Family, list[ReadDocument]], folder: Path
) -> dict[str, dict[str, Any]]:
    """Change of perplexity against the window, on the tokens that both have read."""
    changes = {}
    for family, members in documents.items():
        pairs = [
            (folder / arm / f"{d.name}.npy", folder / "window" / f"{d.name}.npy") for d in members
        ]
        read = [(np.load(a), np.load(b)) for a, b in pairs if a.is_file() and b.is_file()]
        if not read:
            continue
        lengths = [min(len(a), len(b)) for a, b in read]
        difference = compare_token_nats(
            [a[:n] for (a, _), n in zip(read, lengths, strict=True)],
            [b[:n] for (_, b), n in zip(read, lengths, strict=True)],
        )
        changes[family] = {
            "documents": len(read),
            "tokens": sum(lengths),
            "change": difference.perplexity_change,
            "interval": list(difference.perplexity_interval),
        }
    return changes


def find_heads(
    model: Any,
    tokenizer: Tokenizer,
    family: Family,
    corpora: Path,
    folder: Path,
    *,
    max_layers: int = MAX_LAYERS,
    search: str = "inner_product",
) -> dict[str, Any]:
    """What `calibrate` found for a family, kept in a file of `folder`."""
    kind = "" if search == "inner_product" else f"-{search}"
    path = folder / f"calibration-{family}-{max_layers}{kind}.json"
    if not path.is_file():
        documents = load_documents(family, "validation", tokenizer, corpora=corpora)
        document = next(d for d in documents if d.name == CALIBRATED_ON[family])
        tokens = [tokenizer.start_token, *document.tokens[:CALIBRATION_TOKENS].tolist()]
        chosen = calibrate(model, tokens, read="entries", max_layers=max_layers, search=search)
        write_json(
            path,
            {
                "document": document.name,
                "tokens": len(tokens),
                "window": chosen.settings["window"],
                "search": search,
                "heads": {str(layer): list(heads) for layer, heads in chosen.heads.items()},
                "bias": chosen.settings["bias"],
                "nats_without": chosen.nats_without,
                "nats_with": chosen.nats_with,
                "candidates": list(chosen.candidates),
                "slopes": [[round(s, 4) for s in row] for row in chosen.slopes.tolist()],
            },
        )
    values = json.loads(path.read_text())
    print(
        f"{family}: heads {values['heads']}, bias {values['bias']:g}; on {values['document']} "
        f"{values['nats_with']:.3f} nats per token instead of {values['nats_without']:.3f}",
        flush=True,
    )
    return values


def restore_calibration(values: dict[str, Any]) -> EntryCalibration:
    """What `find_heads` gave, to be added to a model."""
    heads = {int(layer): tuple(heads) for layer, heads in values["heads"].items()}
    settings = {key: values[key] for key in ("window", "search", "bias") if key in values}
    settings["read"] = "entries"
    return EntryCalibration(
        heads,
        tuple(values["candidates"]),
        settings,
        torch.tensor(values["slopes"]),
        values["nats_without"],
        values["nats_with"],
    )


def read_arm(
    model: Any, documents: Sequence[ReadDocument], start_token: int, arm: str, folder: Path
) -> None:
    """Write the nats of every token of every document to files, unless they are there."""
    control = arm if arm in CONTROLS else None
    paths = {d.name: folder / arm / f"{d.name}.npy" for d in documents}
    # The control reads the memories of the other documents: all of them, or none.
    groups = [list(documents)] if control == "other_document" else [[d] for d in documents]
    for group in groups:
        if all(paths[document.name].is_file() for document in group):
            continue
        result = evaluate_model(
            model,
            group,  # type: ignore[arg-type]
            capacity=0 if arm == "window" else None,
            control=control,  # type: ignore[arg-type]
            start_token=start_token,
        )
        for document in result.documents:
            path = paths[document.name]
            path.parent.mkdir(parents=True, exist_ok=True)
            np.save(path, document.token_nats)
            print(f"{arm} {document.name}: {document.token_nats.mean():.4f}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
