r"""Is SmolLM2 better at using passages after training with passages in sight?

    python experiments/pretrained/convert.py
    python experiments/pretrained/finetuned_passages.py    # goes on where it stopped
    for model in runs/smollm2 runs/pretrained/finetuned_passages/fp32/model; do
        memorizing benchmark recall $model FILES --prompts 100 --heads 18:6,7 --precision fp32 \
            --arms nothing,passages,bm25 --json recall-$(basename $model).json
    done
    python experiments/pretrained/finetuned_passages.py \
        --recall recall-smollm2.json recall-model.json     # the second less the first

FILES are newer than the model and of no document that it was trained on here.

**Training.** A text behind passages of a memory is worth what it is in one text with them: start
token, passages, text, the best passage last and twice (`attaching/passage_room.py`); so no memory
is needed to train with passages in sight. The text is 64 to 128 tokens of a training package; the
passages, at most 1 to 4 of 128 tokens, are those of the first 32,768 tokens of its package that the
words of its first 48 tokens find. Of every second text these hold the text itself, so that the best
passages have what comes next; of the others nothing within 128 tokens of it. LoRA on all layers as
`memorizing finetune` sets it up, a text a step, loss on the text alone.

**Test.** The same of packages that are held out, where passages hold the text (`quoted`), where
they do not (`other`), and without passages (`alone`): nats a token of the same texts, trained less
untrained, packages and texts in them drawn again. And quotes, by the command above.
"""

from __future__ import annotations

import argparse
import json
import random
import shlex
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from command_line import add_precision_option, make_parser, run_command
from documents import load_documents
from peft.tuners.lora import LoraLayer
from smollm import PRECISIONS, describe_precision, load_smollm
from torch import Tensor

from memorizing.benchmark.memory_use.summary import estimate
from memorizing.benchmark.preparing import describe_machine
from memorizing.data import Tokenizer
from memorizing.errors import CheckpointError, ConfigError
from memorizing.huggingface.attaching.memory_settings import MemorySettings
from memorizing.huggingface.attaching.passage_room import look_up_start_token
from memorizing.huggingface.attaching.passages import (
    Collection,
    choose_among,
    choose_in,
    count_words,
    list_words,
    match_words,
    rank_part,
    weigh_words,
)
from memorizing.huggingface.learning.adapter import (
    add_lora,
    find_lora,
    list_lora,
    load_lora_weights,
)
from memorizing.loss import sum_nats
from memorizing.storage.files import read_json, write_json
from memorizing.storage.folders import write_folder
from memorizing.storage.tensors import read_tensors, write_tensors
from memorizing.training.finetuning import FinetuneSettings
from memorizing.training.optimizer import Optimizer, group_parameters

RESULTS = Path("experiments/results/pretrained_finetuned_passages.json")
RUNS = Path("runs/pretrained/finetuned_passages")
SETTINGS = FinetuneSettings(train="lora", steps=500, rows=1, evaluate_every=0, checkpoint_every=50)
"""LoRA at its usual rate."""
TEXT_LENS = (64, 128)
PROMPT_LEN = 48
"""Tokens whose words find, as of `memorizing benchmark recall`."""
PASSAGE_LEN = 128
PACKAGE_TOKENS = 32_768
"""Of each package, which passages are found among."""
NUM_PASSAGES = {1: 3, 2: 5, 3: 1, 4: 1}
"""How many, at most -> how often, of 10."""
KINDS = ("quoted", "other", "alone")
NUM_TESTS = 20
"""Texts of each held-out package."""
_REMEDY = "remove it to train anew"
_SHOW_EVERY = 10


@dataclass(frozen=True)
class Sample:
    """A text with what stands before it."""

    document: str
    before: tuple[int, ...]
    """The start token, and passages."""
    text: tuple[int, ...]


@dataclass(frozen=True)
class Package:
    """Tokens of a document, to be found by their words."""

    name: str
    tokens: tuple[int, ...]
    collection: Collection


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
    parser.add_argument("--runs", type=Path, default=RUNS, help="folder of checkpoint and model")
    parser.add_argument("--json", type=Path, default=RESULTS)
    parser.add_argument(
        "--recall", type=Path, nargs=2, metavar="JSON", help="compare what the command wrote"
    )
    return parser.parse_args()


def measure(options: argparse.Namespace) -> None:
    """Train and test."""
    options.runs /= options.precision
    settings = replace(SETTINGS, steps=options.steps, seed=options.seed)
    if not (options.runs / "model").is_dir():
        model, tokenizer = load_smollm(options.model, options.device)
        packages = load_packages("train", tokenizer, options)
        train(model, packages, settings, options.runs, PRECISIONS[options.precision])
        base, _ = load_smollm(options.model, options.device)
        write_folder(options.runs / "model", lambda folder: write_merged(folder, base, model))
        # What a model that is loaded from there needs besides.
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(options.model / name, options.runs / "model" / name)
    test(settings, options)


def train(
    model: Any,
    packages: Sequence[Package],
    settings: FinetuneSettings,
    runs: Path,
    dtype: torch.dtype = torch.float32,
) -> None:
    """Train LoRA from the last checkpoint on. In place.

    Raises:
        CheckpointError: the checkpoint is damaged.
        ConfigError: it is of other settings.
    """
    torch.manual_seed(settings.seed)
    add_lora(model, rank=settings.lora_rank, alpha=settings.lora_alpha)
    embedding = [model.get_input_embeddings().weight]
    optimizer = Optimizer(group_parameters(model, embedding, []), settings.make_training_config())
    checkpoint, start_token = runs / "checkpoint", find_start(model)
    first = load_checkpoint(checkpoint, model, optimizer, settings)
    model.train()
    began, recent = time.perf_counter(), []
    for step in range(first + 1, settings.steps + 1):
        sequence = draw_sample(packages, start_token, KINDS[step % 2], f"{settings.seed}/{step}")
        optimizer.zero_grad()
        nats = compute_nats(model, sequence, dtype)
        nats.backward()
        optimizer.clip_gradients(settings.clip_norm)
        optimizer.set_step(step)
        optimizer.step()
        recent.append(nats.item())
        if step % _SHOW_EVERY == 0:
            other, quoted = (sum(recent[n::2]) / len(recent[n::2]) for n in (0, 1))
            seconds = (time.perf_counter() - began) / (step - first)
            print(
                f"step {step}: {quoted:.3f} nats a token quoted, {other:.3f} other; "
                f"{seconds:.1f} s a step",
                flush=True,
            )
            recent = []
        if step % settings.checkpoint_every == 0 or step == settings.steps:
            save_checkpoint(checkpoint, step, model, optimizer, settings)
    model.eval()


def find_start(model: Any) -> int:
    """The token that passages of a memory stand behind."""
    token = look_up_start_token(model.config)
    assert token is not None
    return token


def load_packages(use: Any, tokenizer: Tokenizer, options: argparse.Namespace) -> list[Package]:
    """The first 32,768 tokens of the code of a use."""
    read = load_documents(
        "code", use, tokenizer, corpora=options.corpora, max_tokens=PACKAGE_TOKENS
    )
    packages = []
    for document in read:
        ids = torch.from_numpy(document.tokens).long()
        collection = Collection((len(ids),), {}, lambda ids=ids: ids)
        packages.append(Package(document.name, tuple(ids.tolist()), collection))
    return packages


def draw_sample(packages: Sequence[Package], start_token: int, kind: str, seed: str) -> Sample:
    """A text of a package, with passages of it."""
    rng = random.Random(seed)
    package = rng.choice(packages)
    length = rng.randint(*TEXT_LENS)
    start = rng.randrange(len(package.tokens) - length + 1)
    (number,) = rng.choices(list(NUM_PASSAGES), list(NUM_PASSAGES.values()))
    found = [] if kind == "alone" else find_passages(package, start, length, kind, number)
    standing = [*reversed(found), *found[:1]]
    before = [start_token, *(token for one in standing for token in one)]
    return Sample(package.name, tuple(before), package.tokens[start : start + length])


def find_passages(
    package: Package, start: int, length: int, kind: str, number: int
) -> list[tuple[int, ...]]:
    """Passages for a text of a package, best first.

    Args:
        package: what is searched.
        start: the first token of the text.
        length: its tokens.
        kind: `quoted` searches all; `other` nothing within a passage of the text.
        number: of passages, at most.
    """
    part = package.collection
    words = list_words(torch.tensor(package.tokens[start : start + PROMPT_LEN]))
    counts = count_words(words, part)
    weights = weigh_words(words, (counts > 0).sum(1), counts.shape[1])
    first = part.first_of_chunk
    is_near = (first >= start - PASSAGE_LEN) & (first < start + length + PASSAGE_LEN)
    # Of what is near, no chunk is found, nor one before for the words of its next.
    is_hidden = is_near & (kind == "other")
    matches = match_words(part, counts.masked_fill(is_hidden, 0.0), weights)
    matches = matches.masked_fill(is_hidden, 0.0)
    shares = torch.zeros(1, matches.shape[1])  # words alone find
    scores = rank_part(shares, matches, matches.logsumexp(1))
    found = choose_in(part, shares, scores, number, PASSAGE_LEN)
    spans = choose_among(found, number, MemorySettings.passage_margin)
    return [package.tokens[span.start : span.end] for span in spans]


def compute_nats(model: Any, sequence: Sample, dtype: torch.dtype = torch.float32) -> Tensor:
    """Nats a token of the text; products are in a dtype, weights stay as they are."""
    tokens = torch.tensor([[*sequence.before, *sequence.text]], device=model.device)
    targets = tokens[:, -len(sequence.text) :]
    with torch.autocast(model.device.type, dtype, enabled=dtype != torch.float32):
        logits = model(
            input_ids=tokens[:, :-1], logits_to_keep=targets.shape[1], use_cache=False
        ).logits
    return sum_nats(logits, targets, torch.ones_like(targets, dtype=torch.bool)) / targets.numel()


def save_checkpoint(
    folder: Path, step: int, model: Any, optimizer: Optimizer, settings: FinetuneSettings
) -> None:
    """All that the next step depends on."""
    state, numbers = optimizer.state_dict()
    lora = find_lora(model)
    assert lora is not None
    values = {"step": step, "numbers": numbers, "settings": settings.to_dict()}

    def write(partial: Path) -> None:
        write_tensors(partial / "lora.safetensors", list_lora(model, lora))
        write_tensors(partial / "optimizer.safetensors", state)
        write_json(partial / "state.json", values)

    write_folder(folder, write)


def load_checkpoint(
    folder: Path, model: Any, optimizer: Optimizer, settings: FinetuneSettings
) -> int:
    """Put back what `save_checkpoint` kept; the steps that are done. In place.

    Raises:
        CheckpointError: it is damaged.
        ConfigError: it is of other settings.
    """
    if not folder.is_dir():
        return 0
    values = read_json(folder / "state.json", CheckpointError, _REMEDY)
    if values["settings"] != settings.to_dict():
        raise ConfigError(
            f"{folder} is of a training with other settings; give the same --steps and --seed, or "
            "another --runs"
        )
    tensors = read_tensors(folder / "lora.safetensors", CheckpointError, _REMEDY)
    load_lora_weights(model, tensors, str(folder))
    state = read_tensors(folder / "optimizer.safetensors", CheckpointError, _REMEDY)
    optimizer.load_state_dict(state, values["numbers"])
    return values["step"]


def write_merged(folder: Path, base: Any, model: Any) -> None:
    """Write the base model with what another one has learned added to its weights. In place."""
    lora = find_lora(model)
    with torch.no_grad():
        for name, module in model.named_modules():
            if isinstance(module, LoraLayer):
                base.get_submodule(name).weight += module.get_delta_weight(lora)
    base.save_pretrained(folder)


@torch.inference_mode()
def test(settings: FinetuneSettings, options: argparse.Namespace) -> None:
    """Nats of texts of held-out packages, and write the JSON."""
    nats: dict[str, dict[str, list[float]]] = {}
    sequences: dict[str, list[Sample]] = {}
    for name, folder in (("untrained", options.model), ("trained", options.runs / "model")):
        model, tokenizer = load_smollm(folder, options.device)
        packages = load_packages("test", tokenizer, options)
        sequences = {
            kind: [
                draw_sample([package], find_start(model), kind, f"test/{number}")
                for package in packages
                for number in range(options.tests)
            ]
            for kind in KINDS
        }
        nats[name] = {
            kind: [compute_nats(model, one, PRECISIONS[options.precision]).item() for one in drawn]
            for kind, drawn in sequences.items()
        }
    values: dict[str, Any] = {"kinds": {}}
    for kind, drawn in sequences.items():
        groups, lengths = [one.document for one in drawn], [len(one.text) for one in drawn]
        sums = {
            name: [mean * length for mean, length in zip(by_kind[kind], lengths, strict=True)]
            for name, by_kind in nats.items()
        }
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
