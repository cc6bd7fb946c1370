r"""Is SmolLM2 better at using passages after training with passages in sight?

    python experiments/pretrained/convert.py
    python experiments/corpora/build.py code
    python experiments/pretrained/finetuned_passages.py    # goes on where it stopped
    RECALL="memorizing benchmark recall runs/smollm2 FILES --prompts 100 --heads 18:6,7 \
        --precision fp32 --arms nothing,passages,bm25"
    $RECALL --json untrained.json
    $RECALL --json trained.json --adapter runs/pretrained/finetuned_passages/fp32/adapter
    python experiments/pretrained/finetuned_passages.py --recall untrained.json trained.json

FILES are newer than the model and of no document that it was trained on here.

**Training** is that of `memorizing finetune --read passages` (`finetuning/examples.py`), a text a
step, on the first 32,768 tokens of each training package.

**Test.** The same of packages that are held out, where passages hold the text (`quoted`), where
they do not (`other`), and without passages (`alone`): nats a token of the same texts, trained less
untrained, packages and texts in them drawn again. And quotes, by the command above.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from command_line import add_precision_option, make_parser, run_command
from documents import load_documents
from smollm import PRECISIONS, describe_precision, load_smollm
from transformers import AutoTokenizer

from memorizing import add_memory, load_adapter, remove_memory
from memorizing.benchmark.memory_use.summary import estimate
from memorizing.benchmark.preparing import describe_machine
from memorizing.data import TokenizedDocument, Tokenizer
from memorizing.errors import ConfigError
from memorizing.huggingface.attaching.memory_settings import MemorySettings
from memorizing.huggingface.sessions.scoring import find_start_token
from memorizing.storage.files import write_json
from memorizing.training import finetune
from memorizing.training.finetuning import FinetuneSettings
from memorizing.training.finetuning.examples import KINDS, SHELF_LEN, Example, Examples
from memorizing.training.finetuning.passage_rows import score_examples
from memorizing.training.finetuning.run import RESULT_FOLDER, SETTINGS_FILE

RESULTS = Path("experiments/results/pretrained_finetuned_passages.json")
RUNS = Path("runs/pretrained/finetuned_passages")
SETTINGS = FinetuneSettings(train="lora", steps=500, rows=1, evaluate_every=0, checkpoint_every=50)
"""LoRA at its usual rate."""
NUM_TESTS = 20
"""Texts of each held-out package."""


def main() -> int:
    """Train and test what is not done yet, and write the JSON."""
    options = parse_options()
    return run_command(compare_recall if options.recall else measure, options)


def parse_options() -> argparse.Namespace:
    """The command line."""
    parser = make_parser(__doc__)
    add_precision_option(parser)
    parser.add_argument("--steps", type=int, default=SETTINGS.steps)
    parser.add_argument("--seed", type=int, default=SETTINGS.seed)
    parser.add_argument("--tests", type=int, default=NUM_TESTS, help="texts of each package")
    parser.add_argument("--runs", type=Path, default=RUNS, help="folder of the run")
    parser.add_argument("--json", type=Path, default=RESULTS)
    parser.add_argument(
        "--recall", type=Path, nargs=2, metavar="JSON", help="compare what the command wrote"
    )
    return parser.parse_args()


def measure(options: argparse.Namespace) -> None:
    """Train and test."""
    run = options.runs / options.precision
    settings = replace(SETTINGS, steps=options.steps, seed=options.seed)
    if not (run / RESULT_FOLDER).is_dir():
        train(settings, run, options)
    test(settings, run, options)


def train(settings: FinetuneSettings, run: Path, options: argparse.Namespace) -> None:
    """Finetune, or go on with it.

    Raises:
        KeyboardInterrupt: a signal ended it; it is saved.
    """
    model, own_tokenizer = load_smollm(options.model, options.device, PRECISIONS[options.precision])
    result = finetune(
        add_memory(model, read="passages"),
        AutoTokenizer.from_pretrained(options.model, trust_remote_code=False),
        load_packages("train", own_tokenizer, options),
        settings,
        run,
        resume=(run / SETTINGS_FILE).is_file(),
        about={"model": str(options.model)},
    )
    if result.interrupted:
        raise KeyboardInterrupt


def load_packages(
    use: Any, tokenizer: Tokenizer, options: argparse.Namespace
) -> list[TokenizedDocument]:
    """The beginning of the code of a use."""
    read = load_documents("code", use, tokenizer, corpora=options.corpora, max_tokens=SHELF_LEN)
    return [TokenizedDocument(one.name, one.tokens, one.num_bytes) for one in read]


def test(settings: FinetuneSettings, run: Path, options: argparse.Namespace) -> None:
    """Nats of texts of held-out packages, and write the JSON."""
    nats: dict[str, list[float]] = {}
    drawn: list[tuple[str, str, Example]] = []
    for name in ("untrained", "trained"):
        model, tokenizer = load_smollm(options.model, options.device, PRECISIONS[options.precision])
        if name == "trained":
            remove_memory(load_adapter(model, run / RESULT_FOLDER))
        drawn = [
            (kind, package.name, examples.draw(kind, f"test/{number}"))
            for package in load_packages("test", tokenizer, options)
            for examples in [Examples([package], MemorySettings((0,)), find_start_token(model))]
            for kind in KINDS
            for number in range(options.tests)
        ]
        scored = score_examples(model, [one for _, _, one in drawn])
        nats[name] = [float(each.sum()) for each in scored]
    values: dict[str, Any] = {"kinds": {}}
    for kind in KINDS:
        places = [place for place, one in enumerate(drawn) if one[0] == kind]
        groups = [drawn[place][1] for place in places]
        lengths = [len(drawn[place][2].text) for place in places]
        sums = {name: [summed[place] for place in places] for name, summed in nats.items()}
        sums["change"] = [
            after - before for before, after in zip(sums["untrained"], sums["trained"], strict=True)
        ]
        found = {name: estimate(summed, lengths, groups) for name, summed in sums.items()}
        values["kinds"][kind] = {name: asdict(one) for name, one in found.items() if one}
        print(f"{kind}: " + "; ".join(f"{name} {show(one)}" for name, one in found.items()))
    values |= {
        "settings": settings.to_dict(),
        "texts": options.tests,
        "precision": describe_precision(options.device, options.precision),
        "command": shlex.join(["python", *sys.argv]),
        "machine": describe_machine(),
    }
    write_json(options.json, values)


def compare_recall(options: argparse.Namespace) -> None:
    """Print the second less the first of two results of `memorizing benchmark recall`.

    Raises:
        ConfigError: they are not of the same prompts.
    """
    before, after = (json.loads(path.read_text(encoding="utf-8")) for path in options.recall)
    for key in ("prompt", "answer"):
        if [place[key] for place in before["places"]] != [place[key] for place in after["places"]]:
            raise ConfigError("the two results are not of the same prompts; measure both anew")
    groups = [place["document"] for place in before["places"]]
    numbers: dict[str, Callable[[dict[str, Any]], tuple[float, float]]] = {
        "right": lambda one: (one["num_right"], 1),
        "whole": lambda one: (one["num_right"] == one["num_tokens"], 1),
        "nats": lambda one: (one["nats"], one["num_tokens"]),
    }
    for arm in before["places"][0]["arms"]:
        pairs = [
            (old["arms"][arm], new["arms"][arm])
            for old, new in zip(before["places"], after["places"], strict=True)
        ]
        for name, take in numbers.items():
            below = [take(old)[1] for old, _ in pairs]
            sides = [
                [take(old)[0] for old, _ in pairs],
                [take(new)[0] for _, new in pairs],
                [take(new)[0] - take(old)[0] for old, new in pairs],
            ]
            said = [show(estimate(side, below, groups)) for side in sides]
            print(f"{arm}, {name}: {said[0]}, then {said[1]}; change {said[2]}")


def show(found: Any) -> str:
    """A number with its interval."""
    if found is None:
        return "-"
    ends = "" if found.low is None else f" ({found.low:.3f} to {found.high:.3f})"
    return f"{found.value:.3f}{ends}"


if __name__ == "__main__":
    sys.exit(main())
