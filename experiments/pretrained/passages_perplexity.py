"""What SmolLM2 loses by its window, and what entries and passages of the text behind it bring back.

    python experiments/pretrained/convert.py
    python experiments/corpora/build.py proofs code
    python experiments/pretrained/passages_perplexity.py     # goes on where it stopped

Held-out documents (`documents.py`) are read from their first token with a local window of 512,
1,024, 2,048 tokens, or of all that the model was trained on (`native`: 8,192). From token 8,192 on,
`EVERY` tokens apart, pieces of `PIECE` tokens are scored, each of them from a copy of what was
read, so that all arms predict the same tokens behind the same text:

- `window`: no memory;
- `entries`: the heads that `calibrate` chose (`training_free.py`) mix in the nearest 32 entries;
- `passages`: these heads find 4 passages of 128 tokens, which all layers read; `passages_8x64`
  likewise. Under `native` the window is so much shorter that both fit into the 8,192;
- `both`: the one and the other;
- `shuffled`: passages whose tokens are mixed up;
- `bm25`: no memory; BM25 finds as many passages, and the window is read anew behind them.

All are found by what comes before the piece, once per piece. Nothing is trained. A window of 1,024
costs as much attention as one of 512 with passages. Nats of every token go to
`runs/pretrained/passages_perplexity`, sums to the JSON.

**Deviation:** what the window holds was read without memory in all arms, which is cheaper.
"""

from __future__ import annotations

import argparse
import copy
import json
import shlex
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from command_line import add_precision_option, make_parser, run_command
from documents import FAMILIES, Family, ReadDocument, load_documents
from rich.console import Console
from rich.table import Table
from smollm import CONTEXT_LEN, PRECISIONS, describe_precision, load_smollm
from training_free import RESULTS as CALIBRATED
from training_free import restore_calibration

from memorizing import remove_memory
from memorizing.benchmark.preparing import describe_machine
from memorizing.data import Tokenizer
from memorizing.evaluation.in_context import InContext, InContextReader
from memorizing.huggingface.attaching.attachment import get_attachment
from memorizing.huggingface.sessions.scoring import read_memory
from memorizing.loss import compute_token_nats
from memorizing.memory import RetrievalControl
from memorizing.metrics import compare_token_nats
from memorizing.storage.files import write_json

RESULTS = Path("experiments/results/pretrained_passages_perplexity.json")
NATS = Path("runs/pretrained/passages_perplexity")
PIECE, EVERY, TOKENS = 64, 128, 10_240
ARMS: dict[str, dict[str, Any]] = {
    "window": {"is_reading": False},
    "entries": {"read": "entries"},
    "passages": {"read": "passages"},
    "passages_8x64": {"read": "passages", "num_passages": 8, "passage_len": 64},
    "both": {"read": "both"},
    "shuffled": {"read": "passages", "control": RetrievalControl(shuffle_values=True)},
}
RIVAL = "bm25"
WINDOWS = {"512": 512, "1024": 1024, "2048": 2048, "native": CONTEXT_LEN}
BLOCK_LEN = 512
NATIVE_SEGMENT = 64
"""What the positions of a native window with passages are counted in."""


def main() -> int:
    """Measure what is not measured yet, print, and write the JSON."""
    parser = make_parser(__doc__)
    add_precision_option(parser)
    parser.add_argument("--arms", nargs="*", choices=[*ARMS, RIVAL], default=[*ARMS, RIVAL])
    parser.add_argument("--windows", nargs="*", choices=list(WINDOWS), default=list(WINDOWS))
    parser.add_argument("--families", nargs="*", choices=FAMILIES, default=list(FAMILIES))
    parser.add_argument("--documents", type=int, default=4, help="first test documents of a family")
    parser.add_argument("--tokens", type=int, default=TOKENS, help="of each document")
    parser.add_argument("--every", type=int, default=EVERY, help="tokens between pieces")
    parser.add_argument("--nats", type=Path, default=NATS, help="folder; nats of every token")
    parser.add_argument("--json", type=Path, default=RESULTS)
    options = parser.parse_args()
    return run_command(measure, options)


def measure(options: argparse.Namespace) -> None:
    """Every arm on every document; the JSON is written after each."""
    options.nats /= options.precision
    model, tokenizer = load_smollm(options.model, options.device, PRECISIONS[options.precision])
    calibrated = json.loads(CALIBRATED.read_text())["calibration"]
    for window in options.windows:
        for family in options.families:
            documents = load_documents(
                family, "test", tokenizer, corpora=options.corpora, max_tokens=options.tokens
            )
            for document in documents[: options.documents]:
                for arms in plan_streams(window, options):
                    chosen = restore_calibration(calibrated[family])
                    measure_stream(model, tokenizer, document, chosen, window, arms, options)
                report(options)
    show(report(options))


def plan_streams(window: str, options: argparse.Namespace) -> list[list[str]]:
    """Arms that are measured behind one reading of a document."""
    arms = [arm for arm in options.arms if window != "native" or arm != RIVAL]
    if window != "native":
        return [arms]
    # Where nothing is in front of it, the window is longer.
    alone = [arm for arm in arms if arm in ("window", "entries")]
    return [alone, [arm for arm in arms if arm not in alone]]


def measure_stream(
    model: Any,
    tokenizer: Tokenizer,
    document: ReadDocument,
    calibration: Any,
    window: str,
    arms: list[str],
    options: argparse.Namespace,
) -> None:
    """Read a document once, and score its pieces in every arm that is not in a file yet."""
    folder = options.nats / window
    paths = {arm: folder / arm / f"{document.name}.npz" for arm in arms}
    starts = range(CONTEXT_LEN, options.tokens - PIECE + 1, options.every)
    left = [arm for arm, path in paths.items() if not is_measured(path, starts)]
    if not left:
        return
    settings: dict[str, Any] = {"window": WINDOWS[window], "read": "both", "capacity": 16_384}
    settings["segment_len"] = BLOCK_LEN
    if window == "native" and "window" in arms:
        settings["read"] = "entries"
    elif window == "native":
        settings |= {"segment_len": NATIVE_SEGMENT}
        settings["window"] = (CONTEXT_LEN - 5 * 128 - 1) // NATIVE_SEGMENT * NATIVE_SEGMENT
    calibration.add_to(model, **settings)
    began, found = time.monotonic(), {arm: [] for arm in left}
    with torch.inference_mode(), read_memory(get_attachment(model)):
        for start, cache in stream(model, document, tokenizer.start_token, starts):
            for arm in left:
                nats = score_piece(model, tokenizer, document, start, cache, arm)
                found[arm].append(nats)
            means = {arm: round(float(np.mean(found[arm])), 4) for arm in left}
            seconds = time.monotonic() - began
            print(f"{window} {document.name} {start}: {means} {seconds:.0f} s", flush=True)
    remove_memory(model)
    for arm in left:
        paths[arm].parent.mkdir(parents=True, exist_ok=True)
        np.savez(paths[arm], nats=np.stack(found[arm]), starts=np.array(starts))


def is_measured(path: Path, starts: range) -> bool:
    """Whether a file has just these pieces."""
    return path.is_file() and np.load(path)["starts"].tolist() == list(starts)


def stream(
    model: Any, document: ReadDocument, start_token: int, starts: range
) -> Iterator[tuple[int, Any]]:
    """Read a document without memory; a start, and what was read before it."""
    attachment = get_attachment(model)
    inputs = torch.from_numpy(np.concatenate([[start_token], document.tokens])).long()
    cache, segment_len = attachment.make_cache(), attachment.settings.segment_len
    # A call must not go over a place where positions begin again.
    first = (attachment.max_window // BLOCK_LEN - 1) * BLOCK_LEN
    blocks, rest = range(0, first, BLOCK_LEN), range(first, starts[-1], segment_len)
    stops = sorted({*blocks, *rest, *starts})
    for begin, end in zip(stops, stops[1:], strict=False):
        with attachment.change_mode(is_reading=False):
            model.base_model(
                input_ids=inputs[None, begin:end].to(model.device), **attachment.pass_cache(cache)
            )
        if end in starts:
            yield end, cache


def score_piece(
    model: Any, tokenizer: Tokenizer, document: ReadDocument, start: int, cache: Any, arm: str
) -> np.ndarray:
    """(PIECE,) nats of what comes at `start`, in one arm. The cache is left as it is."""
    if arm == RIVAL:
        reader = InContextReader(
            model, document.tokens, tokenizer, tokenizer.start_token, InContext(PIECE)
        )
        return reader.score(start, start + PIECE)
    tokens = torch.from_numpy(document.tokens[start - 1 : start + PIECE]).long()[None]
    with reading(model, **ARMS[arm]):
        attachment = get_attachment(model)
        logits = model(
            input_ids=tokens[:, :-1].to(model.device),
            **attachment.pass_cache(copy.deepcopy(cache)),
        ).logits
    return compute_token_nats(logits, tokens[:, 1:].to(model.device))[0].cpu().numpy()


@contextmanager
def reading(
    model: Any, *, is_reading: bool = True, control: RetrievalControl | None = None, **changes: Any
) -> Iterator[None]:
    """Inside, a memory that was added to do `both` does what an arm does."""
    attachment = get_attachment(model)
    before = attachment.settings
    attachment.settings = replace(before, **changes)
    try:
        with attachment.change_mode(is_reading=is_reading, looks_ahead=False, control=control):
            yield
    finally:
        attachment.settings = before


def report(options: argparse.Namespace) -> dict[str, Any]:
    """Write all that is measured so far to the JSON: nats, and changes of perplexity."""
    rows: dict[str, dict[str, dict[str, Any]]] = {}
    for family in FAMILIES:
        for window in WINDOWS:
            for arm in (*ARMS, RIVAL):
                line = describe_arm(options.nats, family, window, arm)
                if line:
                    rows.setdefault(family, {}).setdefault(window, {})[arm] = line
    values = {
        "precision": describe_precision(options.device, options.precision),
        "tokens": options.tokens,
        "piece": PIECE,
        "every": options.every,
        "rows": rows,
        "machine": describe_machine(),
        "command": shlex.join(["python", *sys.argv]),
    }
    write_json(options.json, values)
    return values


def describe_arm(folder: Path, family: Family, window: str, arm: str) -> dict[str, Any] | None:
    """Nats a token, and changes against the windows, on documents that both have scored."""
    from documents import NAMES

    def load(window: str, arm: str) -> dict[str, np.ndarray]:
        paths = {name: folder / window / arm / f"{name}.npz" for name in NAMES[family]["test"]}
        return {
            name: np.load(path)["nats"].ravel() for name, path in paths.items() if path.is_file()
        }

    mine = load(window, arm)
    if not mine:
        return None
    nats = np.concatenate(list(mine.values()))
    line: dict[str, Any] = {
        "documents": list(mine),
        "tokens": len(nats),
        "nats_per_token": float(nats.mean()),
        "changes": {},
    }
    for against in WINDOWS:
        other = load(against, "window")
        shared = [name for name in mine if name in other and len(mine[name]) == len(other[name])]
        if shared and (against, arm) != (window, "window"):
            change = compare_token_nats(
                [mine[name] for name in shared], [other[name] for name in shared], block_len=PIECE
            )
            line["changes"][against] = {
                "documents": len(shared),
                "change": change.perplexity_change,
                "interval": list(change.perplexity_interval),
            }
    return line


def show(values: dict[str, Any]) -> None:
    """A line per family, window and arm."""
    table = Table("family", "window", "arm", "tokens", "nats", "against its window", "native")
    for family, windows in values["rows"].items():
        for window, arms in windows.items():
            for arm, line in arms.items():
                changes = [line["changes"].get(name) for name in (window, "native")]
                cells = [f"{c['change']:+.1%}" if c else "" for c in changes]
                nats = f"{line['nats_per_token']:.4f}"
                table.add_row(family, window, arm, f"{line['tokens']:,}", nats, *cells)
    Console().print(table)


if __name__ == "__main__":
    sys.exit(main())
