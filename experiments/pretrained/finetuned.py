"""SmolLM2 finetuned to use a memory, against the same finetuning without one.

    python experiments/pretrained/convert.py
    python experiments/corpora/build.py proofs code
    python experiments/pretrained/finetuned.py                    # all; goes on where it stopped
    python experiments/pretrained/finetuned.py --families code --arms memory --seeds 0   # a part
    python experiments/pretrained/finetuned.py --time-steps 8     # only: seconds a step here

Per family of texts and seed two runs, on the same tokens in the same order, LoRA of the same first
weights: `memory`, whose layers and heads `calibrate` chose as in `training_free.py`, and `plain`,
with a capacity of 0. Then the test documents are read from the first token to the last, local
window of 512 and the first four tokens:

- `memory`: the run with memory, with what it read of the same document;
- `off`: the same weights without memory;
- `other_document`, `shuffled`: controls, on the first tokens only; what is gained must be gone;
- `plain`: the run without memory, the baseline of all;
- `context-8192`: the base model with its native context, not finetuned, where `baselines.py` has
  measured it.

Each run and each document is kept in `runs/pretrained/finetuned`, so that several processes may do
a part each. The JSON holds what is there when a process ends.
"""

from __future__ import annotations

import argparse
import json
import shlex
import statistics
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import baselines
import numpy as np
import training_free
from command_line import add_calibrations_option, make_parser, run_command
from documents import FAMILIES, TEST_TOKENS, Family, ReadDocument, load_documents
from smollm import describe_precision, load_smollm
from training_free import CONTROL_TOKENS, CONTROLS, find_heads, read_arm, restore_calibration
from transformers import AutoTokenizer

from memorizing import load_adapter
from memorizing.benchmark.preparing import describe_machine
from memorizing.data import TokenizedDocument, Tokenizer
from memorizing.metrics import Totals, compare_token_nats
from memorizing.storage.files import write_json
from memorizing.training import finetune
from memorizing.training.finetuning import FinetuneSettings
from memorizing.training.finetuning.finetuner import Finetuner
from memorizing.training.finetuning.run import RESULT_FOLDER, SETTINGS_FILE
from memorizing.training.reporting import StepMetrics

RESULTS = Path("experiments/results/pretrained_finetuned.json")
RUNS = Path("runs/pretrained/finetuned")
ARMS = ("memory", "plain")
READS = {"memory": ("memory", "window", *CONTROLS), "plain": ("window",)}
"""How each run reads the test documents, in the words of `training_free.py`."""
SEEDS = (0, 1, 2)

SETTINGS = FinetuneSettings(
    train="lora",
    # Two rows of 300 steps and one row of 600 are as long; a step of two documents is less noisy.
    steps=300,
    rows=2,
    # The memory works before any training (`training_free.py`): LoRA learns the kind of text at its
    # usual rate, and gates begin where `calibrate` left them, free to move by about 3.
    learning_rate=3e-4,
    gate_learning_rate=1e-2,
    lora_rank=16,
    evaluate_every=0,
    checkpoint_every=100,
    keep_checkpoints=1,
)
"""An hour on two cores: 11.5 s a step (Zen 3, no bf16)."""
TRAIN_TOKENS = 8192
"""Of a piece of a training document, and in a memory while it trains: 300 steps of two rows read 37
pieces, and tests are four times as long."""
TRAIN_PIECES: dict[Family, int] = {"proofs": 2, "code": 6}
"""Of each document, one after the other: 58 and 48 pieces, so that none is read twice."""


@dataclass(frozen=True)
class Run:
    """One finetuning."""

    family: Family
    arm: str
    seed: int

    @property
    def name(self) -> str:
        """Of its folder."""
        return f"{self.family}-{self.arm}-{self.seed}"


def main() -> int:
    """Do what is asked for and not done yet, and write the JSON."""
    options = parse_options()
    return run_command(time_steps if options.time_steps else measure, options)


def parse_options() -> argparse.Namespace:
    """The command line."""
    parser = make_parser(__doc__)
    parser.add_argument("--families", nargs="*", choices=FAMILIES, default=list(FAMILIES))
    parser.add_argument("--arms", nargs="*", choices=ARMS, default=list(ARMS))
    parser.add_argument("--seeds", nargs="*", type=int, default=list(SEEDS))
    parser.add_argument("--steps", type=int, default=SETTINGS.steps)
    parser.add_argument("--tokens", type=int, default=TEST_TOKENS, help="of each test document")
    parser.add_argument("--documents", type=int, default=4, help="first test documents of a family")
    parser.add_argument("--time-steps", type=int, default=0, help="only time so many steps")
    parser.add_argument("--runs", type=Path, default=RUNS, help="folder of runs and their nats")
    add_calibrations_option(parser, training_free.NATS)
    parser.add_argument("--baselines", type=Path, default=baselines.NATS)
    parser.add_argument("--json", type=Path, default=RESULTS)
    return parser.parse_args()


def list_runs(options: argparse.Namespace) -> Iterator[Run]:
    """All that is asked for, pairs one after the other."""
    for seed in options.seeds:
        for family in options.families:
            for arm in options.arms:
                yield Run(family, arm, seed)


def measure(options: argparse.Namespace) -> None:
    """Train and read what is missing."""
    for run in list_runs(options):
        if not (options.runs / run.name / RESULT_FOLDER).is_dir():
            train(run, options)
        read_documents(run, options)
        report(options)
    show(report(options))


def prepare(run: Run, options: argparse.Namespace) -> tuple[Any, Tokenizer, list[Any]]:
    """The base model with its memory, its tokenizer, and the documents it is trained on."""
    model, tokenizer = load_smollm(options.model, options.device)
    found = find_heads(model, tokenizer, run.family, options.corpora, options.calibrations)
    capacity = TRAIN_TOKENS if run.arm == "memory" else 0
    restore_calibration(found).add_to(model, capacity=capacity)
    read = load_documents(
        run.family,
        "train",
        tokenizer,
        corpora=options.corpora,
        max_tokens=TRAIN_TOKENS,
        num_pieces=TRAIN_PIECES[run.family],
    )
    return model, tokenizer, [TokenizedDocument(d.name, d.tokens, d.num_bytes) for d in read]


def train(run: Run, options: argparse.Namespace) -> None:
    """Finetune, or go on with it.

    Raises:
        KeyboardInterrupt: a signal ended it; it is saved.
    """
    folder = options.runs / run.name
    model, own_tokenizer, documents = prepare(run, options)
    tokenizer = AutoTokenizer.from_pretrained(options.model, trust_remote_code=False)
    # The model has seen it between the texts of its training; its bos_token begins a conversation.
    tokenizer.bos_token = own_tokenizer.decode([own_tokenizer.start_token])
    result = finetune(
        model,
        tokenizer,
        documents,
        replace(SETTINGS, seed=run.seed, steps=options.steps),
        folder,
        resume=(folder / SETTINGS_FILE).is_file(),
        about={"model": str(options.model), "family": run.family},
    )
    if result.interrupted:
        raise KeyboardInterrupt
    values = asdict(result) | {"run_dir": str(folder), "machine": describe_machine()}
    write_json(folder / "result.json", values)


def read_documents(run: Run, options: argparse.Namespace) -> None:
    """Write the nats of every token of every test document, in every way, unless they are there."""
    folder = options.runs / run.name
    model, tokenizer = load_smollm(options.model, options.device)
    capacity = options.tokens if run.arm == "memory" else 0
    load_adapter(model, folder / RESULT_FOLDER, capacity=capacity)
    for way in READS[run.arm]:
        documents = load_test(run.family, way in CONTROLS, tokenizer, options)
        read_arm(model, documents, tokenizer.start_token, way, folder / "nats")


def load_test(
    family: Family, is_control: bool, tokenizer: Tokenizer, options: argparse.Namespace
) -> list[ReadDocument]:
    """The test documents of a family, whole or, for the controls, their first tokens."""
    num_tokens = min(options.tokens, CONTROL_TOKENS) if is_control else options.tokens
    return load_documents(
        family, "test", tokenizer, corpora=options.corpora, max_tokens=num_tokens
    )[: options.documents]


def time_steps(options: argparse.Namespace) -> None:
    """Print seconds a step of the first run."""
    run = next(list_runs(options))
    model, tokenizer, documents = prepare(run, options)
    seconds: list[float] = []

    def note(metrics: StepMetrics) -> None:
        seconds.append(metrics.step_s)
        print(f"step {metrics.step}: {metrics.step_s:.2f} s", flush=True)

    settings = replace(SETTINGS, seed=run.seed, steps=options.time_steps)
    Finetuner(model, documents, tokenizer.start_token, settings, on_step=note).run()
    # In the first step memories are empty.
    middle = statistics.median(seconds[1:] or seconds)
    print(
        f"{run.name} on {model.device}: {middle:.2f} s a step, "
        f"{middle * options.steps / 60:.0f} min for {options.steps} steps"
    )


def report(options: argparse.Namespace) -> dict[str, Any]:
    """Write all that is measured so far, by any process, to the JSON."""
    values: dict[str, Any] = {
        "precision": describe_precision(options.device),
        "settings": SETTINGS.to_dict() | {"steps": options.steps},
        "train_tokens": {f: [TRAIN_PIECES[f], TRAIN_TOKENS] for f in FAMILIES},
        "test_tokens": options.tokens,
        "families": {},
        "command": shlex.join(["python", *sys.argv]),
    }
    for family in FAMILIES:
        runs = find_runs(family, options.runs)
        if runs:
            values["families"][family] = describe_family(family, runs, options)
    write_json(options.json, values)
    return values


def find_runs(family: Family, folder: Path) -> dict[Run, dict[str, Any]]:
    """The runs of a family that have ended, with how they ended."""
    found = {}
    for path in sorted(folder.glob(f"{family}-*/result.json")):
        _, arm, seed = path.parent.name.split("-")
        found[Run(family, arm, int(seed))] = json.loads(path.read_text(encoding="utf-8"))
    return found


def describe_family(
    family: Family, runs: dict[Run, dict[str, Any]], options: argparse.Namespace
) -> dict[str, Any]:
    """Perplexities of a family's runs, and changes against `plain`, per seed and over all."""
    seeds = sorted({run.seed for run in runs})
    nats = {
        seed: {
            name: load_nats(options.runs / Run(family, arm, seed).name / "nats" / way)
            for name, arm, way in (
                ("plain", "plain", "window"),
                ("memory", "memory", "memory"),
                ("off", "memory", "window"),
                *((control, "memory", control) for control in CONTROLS),
            )
        }
        for seed in seeds
    }
    native = load_nats(options.baselines / "context-8192")
    for by_name in nats.values():
        by_name["context-8192"] = {n: native[n] for n in by_name["plain"] if n in native}
    names = [name for name in next(iter(nats.values())) if name != "plain"]
    return {
        "perplexity": {
            name: {str(seed): describe_documents(nats[seed][name]) for seed in seeds}
            for name in ("plain", *names)
        },
        "changes": {name: compare_seeds(nats, name) for name in names},
        "runs": {run.name: result for run, result in runs.items()},
    }


def load_nats(folder: Path) -> dict[str, np.ndarray]:
    """Nats of every token, by document."""
    return {path.stem: np.load(path) for path in sorted(folder.glob("*.npy"))}


def describe_documents(nats: dict[str, np.ndarray]) -> dict[str, Any]:
    """Perplexity of each document, and of all tokens."""
    each = {name: Totals(float(n.sum(dtype=np.float64)), len(n)) for name, n in nats.items()}
    total = sum(each.values(), Totals())
    return {
        "all": total.perplexity,
        "tokens": total.tokens,
        "documents": {name: one.perplexity for name, one in each.items()},
    }


def compare_seeds(nats: dict[int, dict[str, dict[str, np.ndarray]]], name: str) -> dict[str, Any]:
    """Change of perplexity against `plain` on the tokens that both have read.

    `all` draws documents, with the mean nats of the seeds in each of their blocks.
    """
    pairs: dict[int, dict[str, tuple[np.ndarray, np.ndarray]]] = {}
    for seed, by_name in nats.items():
        mine, base = by_name[name], by_name["plain"]
        found = {document: cut(mine[document], base[document]) for document in mine.keys() & base}
        if found:
            pairs[seed] = found
    if not pairs:
        return {}
    shared = sorted(set.intersection(*(set(found) for found in pairs.values())))
    values = {
        str(seed): compare_token_nats(*unzip([found[name] for name in sorted(found)])).to_dict()
        for seed, found in pairs.items()
    }
    if shared:
        means = [average([found[document] for found in pairs.values()]) for document in shared]
        values["all"] = compare_token_nats(*unzip(means)).to_dict() | {"documents": shared}
    return values


def average(pairs: list[tuple[np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    """The mean of both, token by token, over what all have read."""
    length = min(len(mine) for mine, _ in pairs)
    mine, base = (np.mean([side[:length] for side in sides], 0) for sides in unzip(pairs))
    return mine, base


def cut(mine: np.ndarray, base: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """What both have read."""
    length = min(len(mine), len(base))
    return mine[:length], base[:length]


def unzip(pairs: list[Any]) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Lists of the first and of the second of each pair."""
    return [mine for mine, _ in pairs], [base for _, base in pairs]


def show(values: dict[str, Any]) -> None:
    """A line per comparison."""
    for family, found in values["families"].items():
        for name, changes in found["changes"].items():
            for seed, change in changes.items():
                low, high = change["perplexity_low"], change["perplexity_high"]
                interval = "" if low is None else f" ({low:+.1%} to {high:+.1%})"
                print(f"{family}, {name}, {seed}: {change['perplexity_change']:+.1%}{interval}")


if __name__ == "__main__":
    sys.exit(main())
