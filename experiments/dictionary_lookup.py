"""Dictionary look-up (`memorizing.data.synthetic`): how far does a memory extrapolate in entries?

Trains small models, with memory and without, on documents of 512 tokens (25 records, then questions
about them), and asks them about more and more records. The local context is one segment of 256
tokens, so that the answer to a key's first question is in the memory or nowhere. In training the
memory also holds documents read before, as distractors. Far beyond the lengths of training the
memory is read with a sharper softmax, `--factors` times what was learned.

    python experiments/dictionary_lookup.py                               # what is claimed
    python experiments/dictionary_lookup.py --recipes all --seeds 100 --without-controls \
        --lengths 65536,1048576,4194304                                   # how it was chosen

A seed is of the initialization, of the documents of training and of those asked about: what is
chosen by seed 100 is claimed by seeds 0 to 2. A document of 16 million tokens takes 9 GB of memory,
and an H200 half a minute beside other jobs (`--jobs`); on a CPU stop at `--lengths
512,65536,262144`. Run again with the same settings, it goes on where it stopped, also within a
training.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from small_models import (
    SmallModel,
    add_machine_options,
    list_machines,
    run_side_by_side,
    sharpen,
)

from memorizing.benchmark.preparing import describe_machine
from memorizing.data.synthetic.batch import BLOCK_LEN, NUM_SYMBOLS
from memorizing.data.synthetic.records import count_questions, make_look_up_batch
from memorizing.evaluation.answers import ask_questions, compute_wilson_interval, read_documents
from memorizing.model import MemorizingTransformer
from memorizing.storage.files import write_json

TRAINING_RECORDS = count_questions()
"""Documents of 512 tokens: a block of records, a block of questions."""
LENGTHS = (512, 2048, 8192, 32_768, 65_536, 262_144, 2**20, 2**22, 2**24)
FACTORS = (1, 2, 3, 4, 6, 8)
DOCUMENTS_PER_SEED = 1_000_000
"""No document of one seed is asked about by another."""
_READ_TOKENS = 2**22
_LEAST_DOCUMENTS, _MOST_DOCUMENTS = 8, 32
"""Read at each length: about so many tokens, in so many documents."""


@dataclass(frozen=True)
class Settings(SmallModel):
    """What is trained, besides the seed."""

    training_blocks: int = 32
    """Blocks of 25 records that the memory holds in training: the document's own and, after a sixth
    of the steps, those read before, so that a query learns to tell keys apart that are alike."""
    num_alike: int = 1
    """In training, keys come in families of this many that differ in one symbol."""


RECIPES = {
    "ours": Settings(),
    "long": Settings(steps=1200),
    "more-distractors": Settings(training_blocks=128),
    "alike": Settings(num_alike=8),
    "soft": Settings(scale_init=4.0),
    "sharp": Settings(scale_init=16.0),
    "long-keys": Settings(head_dim=64),
    "large": Settings(model_dim=256, head_dim=64),
    "tiny": Settings(steps=40, model_dim=64, head_dim=16, training_blocks=4),
}
"""What can be trained; `tiny` only to try the script out."""


@dataclass(frozen=True)
class Score:
    """Share of right answers. A guess has 1 / 60."""

    first: float
    """Value tokens of the first question about a key: only the memory has them."""
    first_interval: tuple[float, float]
    """95%, as if tokens were independent (Wilson)."""
    first_whole: float
    """First questions with all four tokens right."""
    again: float | None
    """Value tokens of later questions about a key: the answer stands in the local context too.
    None where no question is asked twice."""
    num_first: int
    """Value tokens behind `first`."""


@dataclass(frozen=True)
class Plan:
    """What is measured of every model with memory."""

    lengths: tuple[int, ...]
    factors: tuple[float, ...]
    """Of the memory's scale."""
    has_controls: bool
    """Also the model without memory, and at the shortest length the memory of another document."""

    def list_names(self, length: int) -> list[str]:
        """Of the scores at a length, in their order."""
        arms = ["memory" if factor == 1 else f"memory_x{factor:g}" for factor in self.factors]
        if self.has_controls:
            arms += ["without", *(["other_document"] if length == min(self.lengths) else [])]
        return [f"{arm}/{length}" for arm in arms]


def train_model(
    settings: Settings,
    seed: int,
    has_memory: bool,
    folder: Path | None = None,
    num_reports: int = 0,
    device: torch.device | str = "cpu",
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
        device=device,
    )


def evaluate_model(
    model: MemorizingTransformer,
    num_records: int,
    num_documents: int,
    *,
    factors: Sequence[float] = (1.0,),
    control: Literal["other_document"] | None = None,
    rows: int = 8,
    first_document: int = 0,
) -> list[Score]:
    """Answers about documents never trained on. The memory holds a document's records, all of them.

    Args:
        model: with memory or without.
        num_records: of each document.
        num_documents: a multiple of `rows` or fewer.
        factors: the memory's scale is multiplied by; a score for each.
        control: every document reads the memory of another.
        rows: documents read side by side.
        first_document: the seed of the first; the others follow it.
    """
    rows = min(rows, num_documents)
    sharpened = [model if factor == 1 else sharpen(model, factor) for factor in factors]
    is_first, right = [], [[] for _ in factors]
    for start in range(first_document, first_document + num_documents, rows):
        batch = make_look_up_batch(range(start, start + rows), num_records)
        read = read_documents(model, batch)
        is_first.append(batch.is_first)
        for asked, found in zip(sharpened, right, strict=True):
            found.append(ask_questions(asked, read, control).is_right)
        del read  # a memory may be most of what a GPU holds: two are too many
    first = torch.cat(is_first)
    return [_score(torch.cat(found), first) for found in right]


def _score(right: torch.Tensor, is_first: torch.Tensor) -> Score:
    """Of answers (D, Q, A), some of them to first questions (D, Q)."""
    found, again = right[is_first], right[~is_first]
    return Score(
        found.float().mean().item(),
        compute_wilson_interval(int(found.sum()), found.numel()),
        found.all(-1).float().mean().item(),
        again.float().mean().item() if again.numel() else None,
        found.numel(),
    )


def measure_length(
    models: dict[bool, MemorizingTransformer], plan: Plan, length: int, seed: int
) -> dict[str, dict[str, Any]]:
    """The scores of a seed at one length, by name; `models` are those with memory and without."""
    rows = max(1, min(4, 2**18 // length))
    documents = max(_LEAST_DOCUMENTS, min(_MOST_DOCUMENTS, _READ_TOKENS // length)) // rows * rows
    num_records = (length // BLOCK_LEN - 1) * count_questions()
    first = seed * DOCUMENTS_PER_SEED

    def evaluate(
        has_memory: bool, rows: int, factors: Sequence[float] = (1.0,), **options: Any
    ) -> list[dict[str, Any]]:
        start_s = time.perf_counter()
        scores = evaluate_model(
            models[has_memory],
            num_records,
            documents,
            factors=factors,
            rows=rows,
            first_document=first,
            **options,
        )
        seconds = (time.perf_counter() - start_s) / len(factors)
        size = {"records": num_records, "documents": documents, "seconds": seconds}
        return [asdict(score) | size for score in scores]

    scores = evaluate(True, rows, plan.factors)
    if plan.has_controls:
        scores += evaluate(False, rows)
        if length == min(plan.lengths):
            scores += evaluate(True, max(rows, 2), control="other_document")
    return dict(zip(plan.list_names(length), scores, strict=True))


def run_seed(recipe: str, seed: int, plan: Plan, output: Path, device: torch.device) -> None:
    """Train and measure what is not there yet, in `output/recipe/seed-N/result.json`."""
    settings, folder = RECIPES[recipe], output / recipe / f"seed-{seed}"
    path, label = folder / "result.json", f"{recipe}, seed {seed}"
    results = _open_results(path, settings)
    lengths = [
        length
        for length in plan.lengths
        if not results["scores"].keys() >= set(plan.list_names(length))
    ]
    if not lengths:
        return
    models = {}
    for has_memory in (True, False) if plan.has_controls else (True,):
        arm = "memory" if has_memory else "without"
        print(f"{label}, {arm}: training, unless it is done", flush=True)
        models[has_memory] = train_model(
            settings, seed, has_memory, folder / arm, num_reports=5, device=device
        )
    results["weights"] = sum(p.numel() for p in models[True].parameters())
    results["machine"] = describe_machine()
    for length in lengths:
        scores = measure_length(models, plan, length, seed)
        results["scores"] |= scores
        write_json(path, results)
        for name, score in scores.items():
            print(f"{label}, {name}: {score['first']:.1%} ({score['seconds']:.0f} s)", flush=True)


def _open_results(path: Path, settings: Settings) -> dict[str, Any]:
    """What an earlier run of the same settings has measured."""
    if not path.exists():
        return {"settings": asdict(settings), "scores": {}}
    results = json.loads(path.read_text(encoding="utf-8"))
    if results["settings"] != asdict(settings):
        raise SystemExit(
            f"{path} has the settings {results['settings']}, asked for are {asdict(settings)}; "
            "choose another --output"
        )
    return results


def collect(recipe: str, seeds: Sequence[int], plan: Plan, output: Path) -> dict[str, Any]:
    """The results of a recipe, all seeds together: what the plan asks for."""
    found = {}
    for seed in seeds:
        path = output / recipe / f"seed-{seed}" / "result.json"
        found[str(seed)] = json.loads(path.read_text(encoding="utf-8"))
    names = [name for length in plan.lengths for name in plan.list_names(length)]
    return {
        "recipe": recipe,
        "settings": asdict(RECIPES[recipe]),
        "weights": next(iter(found.values()))["weights"],
        "chance": 1 / NUM_SYMBOLS,
        "scores": {
            seed: {name: result["scores"][name] for name in names} for seed, result in found.items()
        },
        "machines": list_machines(found.values()),
    }


def show(results: dict[str, Any]) -> None:
    """A line for each score, with all seeds."""
    scores = results["scores"]
    print(
        f"\n{results['recipe']}, {results['weights']:,} weights; first questions: value tokens "
        f"right (all four right), by seed {', '.join(scores)}"
    )
    for name in next(iter(scores.values())):
        arm, _, length = name.partition("/")
        cells = [f"{s[name]['first']:.1%} ({s[name]['first_whole']:.1%})" for s in scores.values()]
        print(f"{int(length):>10,} tokens  {arm:<15} {'  '.join(cells)}")


def _parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Dictionary look-up with and without memory")
    parser.add_argument("--output", type=Path, default=Path("runs/dictionary_lookup"))
    parser.add_argument("--json", type=Path, default=None, help="also write the results here")
    parser.add_argument(
        "--recipes", default="ours", help=f"with commas between: {', '.join(RECIPES)}; or all"
    )
    parser.add_argument("--seeds", default="0,1,2", help="initialization and documents")
    parser.add_argument("--lengths", default=",".join(map(str, LENGTHS)), help="tokens read")
    factors = ",".join(f"{factor:g}" for factor in FACTORS)
    parser.add_argument("--factors", default=factors, help="of the memory's scale at evaluation")
    parser.add_argument(
        "--without-controls", action="store_true", help="measure models with memory only"
    )
    add_machine_options(parser)
    return parser.parse_args()


def _parse_plan(arguments: argparse.Namespace) -> Plan:
    lengths = tuple(int(length) for length in arguments.lengths.split(","))
    if any(length % BLOCK_LEN or length < 2 * BLOCK_LEN for length in lengths):
        raise SystemExit(
            f"--lengths are {lengths}; give multiples of {BLOCK_LEN}, at least two blocks"
        )
    factors = tuple(float(factor) for factor in arguments.factors.split(","))
    return Plan(lengths, factors, not arguments.without_controls)


def _parse_recipes(names: str) -> list[str]:
    if names == "all":
        return [name for name in RECIPES if name != "tiny"]
    recipes = names.split(",")
    if unknown := [name for name in recipes if name not in RECIPES]:
        raise SystemExit(f"--recipes has {unknown[0]!r}; choose from {', '.join(RECIPES)}, or all")
    return recipes


def main() -> None:
    """Train and measure what is not measured yet; print the tables."""
    arguments = _parse_arguments()
    plan, recipes = _parse_plan(arguments), _parse_recipes(arguments.recipes)
    seeds = [int(seed) for seed in arguments.seeds.split(",")]
    calls = [
        (recipe, seed, plan, arguments.output, arguments.device)
        for recipe in recipes
        for seed in seeds
    ]
    run_side_by_side(run_seed, calls, arguments.jobs)
    everything = {name: collect(name, seeds, plan, arguments.output) for name in recipes}
    for results in everything.values():
        show(results)
    if arguments.json is not None:
        write_json(arguments.json, everything if len(recipes) > 1 else everything[recipes[0]])


if __name__ == "__main__":
    main()
