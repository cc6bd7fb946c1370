"""Dictionary look-up (`memorizing.data.synthetic`): how far does a memory extrapolate in entries?

Trains small models, with memory and without, on documents of 512 tokens (25 records, then questions
about them), and asks them about more and more records. The local context is one segment of 256
tokens, so that the answer to a key's first question is in the memory or nowhere. In training the
memory also holds documents read before, as distractors (`--training-blocks`; 1 turns that off).
Run again with the same settings, it goes on where it stopped, also within a training.

    python experiments/dictionary_lookup.py --output runs/dictionary_lookup --seeds 0,1,2
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import torch
from small_models import SHARPNESS, SmallModel, sharpen

from memorizing.data.synthetic import (
    BLOCK_LEN,
    NUM_SYMBOLS,
    count_questions,
    make_look_up_batch,
)
from memorizing.evaluation.answers import answer_questions, compute_wilson_interval
from memorizing.files import write_json
from memorizing.model import MemorizingTransformer

TRAINING_RECORDS = count_questions()
"""Documents of 512 tokens: a block of records, a block of questions."""


@dataclass(frozen=True)
class Settings(SmallModel):
    """What is trained, besides the seed."""

    training_blocks: int = 32
    """Blocks of 25 records that the memory holds in training: the document's own and, after a sixth
    of the steps, those read before, so that a query learns to tell keys apart that are alike."""
    num_alike: int = 1
    """In training, keys come in families of this many that differ in one symbol."""


@dataclass(frozen=True)
class Score:
    """Share of right answers. A guess has 1 / 60."""

    first: float
    """Value tokens of the first question about a key: only the memory has them."""
    first_interval: tuple[float, float]
    """95%, as if tokens were independent (Wilson)."""
    first_whole: float
    """First questions with all four tokens right."""
    again: float
    """Value tokens of later questions about a key: the answer stands in the local context too."""
    num_first: int
    """Value tokens behind `first`."""


def train_model(
    settings: Settings,
    seed: int,
    has_memory: bool,
    folder: Path | None = None,
    num_reports: int = 0,
) -> MemorizingTransformer:
    """Train a model, or take the one that is kept in the folder; the same documents for both arms.

    Both start with the same weights.
    """
    return settings.train(
        lambda _, seeds: make_look_up_batch(seeds, TRAINING_RECORDS, num_alike=settings.num_alike),
        seed,
        num_blocks=settings.training_blocks if has_memory else 0,
        keeps_documents=settings.training_blocks > 1,
        folder=folder,
        num_reports=num_reports,
    )


def evaluate_model(
    model: MemorizingTransformer,
    num_records: int,
    num_documents: int,
    *,
    control: Literal["other_document"] | None = None,
    rows: int = 8,
) -> Score:
    """Answers about documents never trained on. The memory holds a document's records, all of them.

    Args:
        model: with memory or without.
        num_records: of each document.
        num_documents: with seeds from 0 on; a multiple of `rows` or fewer.
        control: every document reads the memory of another.
        rows: documents read side by side.
    """
    rows = min(rows, num_documents)
    first, again = [], []
    for seed in range(0, num_documents, rows):
        batch = make_look_up_batch(range(seed, seed + rows), num_records)
        right = answer_questions(model, batch, control=control).is_right
        first.append(right[batch.is_first])
        again.append(right[~batch.is_first])
    found = torch.cat(first)
    return Score(
        found.float().mean().item(),
        compute_wilson_interval(int(found.sum()), found.numel()),
        found.all(-1).float().mean().item(),
        torch.cat(again).float().mean().item(),
        found.numel(),
    )


def _iterate_measurements(
    lengths: list[int], tokens: int, factors: list[float]
) -> Iterator[tuple[str, float, bool, int, int, int]]:
    """Name, factor of the scale (0: no memory), control, records, documents and rows."""
    for length in lengths:
        num_records = (length // BLOCK_LEN - 1) * count_questions()
        rows = max(1, min(4, 2**18 // length))
        documents = max(4, min(32, tokens // length)) // rows * rows
        size = (num_records, documents, rows)
        for factor in factors:
            name = "memory" if factor == 1 else f"memory_x{factor:g}"
            yield f"{name}/{length}", factor, False, *size
        yield f"without/{length}", 0.0, False, *size
        if length == min(lengths):
            yield f"other_document/{length}", 1.0, True, *size


def _parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Dictionary look-up with and without memory")
    parser.add_argument("--output", type=Path, default=Path("runs/dictionary_lookup"))
    parser.add_argument("--json", type=Path, default=None, help="also write the result here")
    parser.add_argument("--seeds", default="0,1,2", help="initialization and training documents")
    parser.add_argument("--lengths", default="512,2048,8192,32768,65536,131072,262144")
    factors = f"1,{SHARPNESS:g}"
    parser.add_argument("--factors", default=factors, help="of the memory's scale at evaluation")
    parser.add_argument(
        "--tokens", type=int, default=2**19, help="read per length, in 4 to 32 documents"
    )
    for field in dataclasses.fields(Settings):
        name = f"--{field.name.replace('_', '-')}"
        parser.add_argument(name, type=type(field.default), default=field.default)
    return parser.parse_args()


def _open_results(path: Path, settings: Settings) -> dict:
    """What an earlier run of the same settings has measured."""
    if not path.exists():
        return {"settings": asdict(settings), "chance": 1 / NUM_SYMBOLS, "scores": {}}
    results = json.loads(path.read_text(encoding="utf-8"))
    if results["settings"] != asdict(settings):
        raise SystemExit(
            f"{path} has the settings {results['settings']}, asked for are {asdict(settings)}; "
            "choose another --output"
        )
    return results


def _print_table(scores: dict[str, dict[str, dict]], names: list[str]) -> None:
    print("\nfirst questions: value tokens right (all four right), by seed")
    for name in names:
        arm, _, length = name.partition("/")
        cells = [f"{s[name]['first']:.1%} ({s[name]['first_whole']:.1%})" for s in scores.values()]
        print(f"{int(length):>9,} tokens  {arm:<15} {'  '.join(cells)}")


def main() -> None:
    """Train and measure what is not measured yet; print the table."""
    arguments = _parse_arguments()
    settings = Settings(**{name: getattr(arguments, name) for name in asdict(Settings())})
    path = arguments.output / "result.json"
    results = _open_results(path, settings)
    lengths = [int(length) for length in arguments.lengths.split(",")]
    if any(length % BLOCK_LEN or length < 2 * BLOCK_LEN for length in lengths):
        raise SystemExit(
            f"--lengths are {lengths}; give multiples of {BLOCK_LEN}, at least two blocks"
        )
    factors = [float(factor) for factor in arguments.factors.split(",")]
    measurements = list(_iterate_measurements(lengths, arguments.tokens, factors))
    seeds = arguments.seeds.split(",")
    for seed in seeds:
        models = {}
        for has_memory in (True, False):
            arm = "memory" if has_memory else "without"
            folder = arguments.output / f"seed-{seed}-{arm}"
            print(f"seed {seed}, {arm}: training, unless it is done", flush=True)
            models[has_memory] = train_model(settings, int(seed), has_memory, folder, 20)
        scores = results["scores"].setdefault(seed, {})
        for name, factor, is_control, num_records, documents, rows in measurements:
            if name in scores:
                continue
            start = time.perf_counter()
            score = evaluate_model(
                sharpen(models[True], factor) if factor else models[False],
                num_records,
                documents,
                control="other_document" if is_control else None,
                rows=rows,
            )
            seconds = time.perf_counter() - start
            scores[name] = asdict(score) | {
                "records": num_records,
                "documents": documents,
                "seconds": seconds,
            }
            write_json(path, results)
            print(f"seed {seed}, {name}: {score.first:.1%} ({seconds:.0f} s)", flush=True)
    _print_table({s: results["scores"][s] for s in seeds}, [name for name, *_ in measurements])
    if arguments.json is not None:
        write_json(arguments.json, results)


if __name__ == "__main__":
    main()
