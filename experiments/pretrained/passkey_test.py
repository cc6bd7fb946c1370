"""Passkeys that SmolLM2 finds in its memory, 64K tokens back, after finetuning on short documents.

    python experiments/pretrained/convert.py
    python experiments/corpora/build.py code             # for the calibration, if there is none yet
    python experiments/pretrained/passkey_test.py        # goes on where it stopped

Documents are those of `passkey.py`: other sentences and keys in the tests than in training.

**Training.** LoRA, gates and scales, as `memorizing finetune` trains them, on documents of at most
8K tokens, each read anew with a memory of its own, 8 side by side: all of it but the last segment
without gradient, then the last one, whose loss counts the answer only. The layers and heads are
those that `calibrate` found on code: they continue what was seen before.

**Test.** An answer is right when greedy decoding would have written the key, and then no further
digit: every token is predicted after the right ones before it, and the likeliest must be the right
one. Local attention sees 512 tokens and the first four; keys stand at depths from 0 to 0.8, out of
its sight at all lengths. `memory`, and `off`: the same weights without memory.

Results are kept by length in `runs/pretrained/passkey`; the JSON holds what is there.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import shlex
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import training_free
from command_line import add_calibrations_option, make_parser, run_command
from passkey import PasskeySample, load_sentences, make_grid, make_sample
from smollm import describe_precision, load_smollm
from torch import Tensor
from training_free import find_heads, restore_calibration
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from memorizing import load_adapter
from memorizing.benchmark.machine import describe_machine
from memorizing.evaluation.answers import compute_wilson_interval
from memorizing.files import write_json
from memorizing.huggingface.adapter import save_adapter
from memorizing.huggingface.attachment import get_attachment
from memorizing.huggingface.scoring import read_memory
from memorizing.loss import sum_nats
from memorizing.training.finetuning import FinetuneSettings
from memorizing.training.finetuning.weights import TrainedWeights, prepare_weights
from memorizing.training.optimizer import Optimizer, clip_gradients

RESULTS = Path("experiments/results/pretrained_passkey.json")
RUNS = Path("runs/pretrained/passkey")
SETTINGS = FinetuneSettings(train="lora", steps=500, rows=8, evaluate_every=0)
"""LoRA and gates at their usual rates."""
TRAIN_SEGMENTS = (2, 3, 5, 8, 12, 16)
"""Of the documents of a step, drawn: 1K to 8K tokens. An eighth of the longest test."""
FIRST_SEGMENTS = TRAIN_SEGMENTS[:2]
"""In the first half of the steps, which then take a third of the time."""
CALIBRATED_ON = "code"
TEST_LENS = (4096, 8192, 16_384, 32_768, 65_536)
"""Tokens with the start token and the answer, in the order of the JSON."""
DEPTHS = tuple(place / 10 for place in range(9))
"""At 4,096 tokens and a depth of 0.8 the key is 800 tokens back: no window of 512 sees it."""
SAMPLES = 6
"""Of each length at each depth: 54."""
ARMS = ("memory", "off")
_SHOW_EVERY = 10


@dataclass(frozen=True)
class Batch:
    """Documents of one length, with their answers but for the last token of these."""

    inputs: Tensor
    """(B, T) int64: start token, document, answer."""
    answers: Tensor
    """(B, A) int64: what the last A inputs predict."""


def main() -> int:
    """Train, test what is not tested yet, and write the JSON."""
    options = parse_options()
    return run_command(measure, options)


def parse_options() -> argparse.Namespace:
    """The command line."""
    parser = make_parser(__doc__)
    parser.add_argument("--steps", type=int, default=SETTINGS.steps)
    parser.add_argument("--arms", nargs="*", choices=ARMS, default=list(ARMS))
    parser.add_argument(
        "--lens", nargs="*", type=int, default=list(TEST_LENS), help="tested in this order"
    )
    parser.add_argument("--samples", type=int, default=SAMPLES, help="of each length and depth")
    parser.add_argument("--rows", type=int, default=9, help="tested side by side")
    parser.add_argument("--seed", type=int, default=0, help="of the training")
    parser.add_argument("--runs", type=Path, default=RUNS)
    add_calibrations_option(parser, training_free.NATS)
    parser.add_argument("--json", type=Path, default=RESULTS)
    return parser.parse_args()


def measure(options: argparse.Namespace) -> None:
    """Train where there is no adapter yet, then test length after length."""
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    adapter = options.runs / f"adapter-{options.seed}"
    if not adapter.is_dir():
        train(tokenizer, adapter, options)
    model, own_tokenizer = load_smollm(options.model, options.device)
    load_adapter(model, adapter, capacity=max(options.lens))
    for arm, num_tokens in itertools.product(options.arms, options.lens):
        path = options.runs / f"{arm}-{num_tokens}-{options.seed}.json"
        if not path.is_file():
            test(model, tokenizer, own_tokenizer.start_token, arm, num_tokens, path, options)
        report(options)


def train(tokenizer: PreTrainedTokenizerBase, adapter: Path, options: argparse.Namespace) -> None:
    """Finetune the base model, and save what was learned."""
    model, own_tokenizer = load_smollm(options.model, options.device)
    found = find_heads(model, own_tokenizer, CALIBRATED_ON, options.corpora, options.calibrations)
    segment_len = found["window"]
    restore_calibration(found).add_to(model, capacity=max(TRAIN_SEGMENTS) * segment_len)
    attachment = get_attachment(model)
    settings = replace(SETTINGS, steps=options.steps, seed=options.seed)
    torch.manual_seed(settings.seed)
    prepare_weights(model, attachment, settings)
    optimizer = Optimizer(TrainedWeights(model, attachment).groups, settings.make_training_config())
    rng, began = random.Random(settings.seed), time.perf_counter()
    recent: list[tuple[float, float]] = []
    for step in range(1, settings.steps + 1):
        batch = draw_batch(tokenizer, own_tokenizer.start_token, step, rng, segment_len, settings)
        optimizer.zero_grad()
        recent.append(learn(model, batch))
        clip_gradients(optimizer.parameters(), settings.clip_norm)
        optimizer.set_step(step)
        optimizer.step()
        if step % _SHOW_EVERY == 0 or step == settings.steps:
            nats, right = (sum(values) / len(recent) for values in zip(*recent, strict=True))
            seconds = time.perf_counter() - began
            print(
                f"step {step}: {nats:.4f} nats per answer token, {right:.0%} of answers right, "
                f"{seconds:.0f} s",
                flush=True,
            )
            recent = []
    adapter.parent.mkdir(parents=True, exist_ok=True)
    unfinished = adapter.with_name(f"{adapter.name}.unfinished")
    save_adapter(model, unfinished)
    unfinished.rename(adapter)


def draw_batch(
    tokenizer: PreTrainedTokenizerBase,
    start_token: int,
    step: int,
    rng: random.Random,
    segment_len: int,
    settings: FinetuneSettings,
) -> Batch:
    """Training documents of one length, keys anywhere in them.

    The last segment holds the question: it is at least an eighth of a segment.
    """
    is_first = step <= settings.steps // 2
    num_segments = rng.choice(FIRST_SEGMENTS if is_first else TRAIN_SEGMENTS)
    spared = rng.randrange(segment_len * 7 // 8)
    samples = []
    for row in range(settings.rows):
        seed = f"{settings.seed}/{step}/{row}"
        num_tokens = num_segments * segment_len - spared
        samples.append(draw_sample(tokenizer, num_tokens, rng.random(), seed, "train"))
    return make_batch(samples, start_token)


def draw_sample(
    tokenizer: PreTrainedTokenizerBase, num_tokens: int, depth: float, seed: str, split: Any
) -> PasskeySample:
    """A sample that has `num_tokens` tokens with the start token and all of the answer but one."""
    sentences = load_sentences(split)
    # Digits are tokens by themselves, so that all answers are equally long.
    answer_len = len(make_sample(tokenizer, 128, 0.0, seed, split, sentences=sentences).answer)
    return make_sample(tokenizer, num_tokens - answer_len, depth, seed, split, sentences=sentences)


def make_batch(samples: Sequence[PasskeySample], start_token: int) -> Batch:
    """Samples of equal length side by side."""
    return Batch(
        torch.tensor([[start_token, *s.tokens, *s.answer[:-1]] for s in samples]),
        torch.tensor([s.answer for s in samples]),
    )


def split_batch(batch: Batch, segment_len: int) -> tuple[Tensor, Tensor]:
    """Whole segments but for the last, which begins no later than the first answer's token."""
    num_tokens, num_answer = batch.inputs.shape[1], batch.answers.shape[1]
    begin = (num_tokens - num_answer) // segment_len * segment_len
    return batch.inputs[:, :begin], batch.inputs[:, begin:]


def learn(model: Any, batch: Batch) -> tuple[float, float]:
    """Add the gradient of a batch; nats per token of its answers, and the share that is right."""
    attachment = get_attachment(model)
    with read_memory(attachment):
        with torch.no_grad():
            cache, question = read_filler(model, batch)
        attachment.commit(cache)
        logits = model(
            input_ids=question.to(model.device),
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=batch.answers.shape[1],
        ).logits
        answers = batch.answers.to(model.device)
        nats = sum_nats(logits, answers, torch.ones_like(answers, dtype=torch.bool))
        (nats / answers.numel()).backward()
    right = (logits.argmax(-1) == answers).all(-1).float().mean()
    return nats.item() / answers.numel(), right.item()


def read_filler(model: Any, batch: Batch) -> tuple[Any, Tensor]:
    """The cache after all segments but the last, and the last."""
    attachment = get_attachment(model)
    segment_len = attachment.settings.segment_len
    filler, question = split_batch(batch, segment_len)
    cache = attachment.make_cache()
    for piece in filler.split(segment_len, dim=1) if filler.shape[1] else ():
        model(
            input_ids=piece.to(model.device),
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
    return cache, question


@torch.inference_mode()
def answer(model: Any, batch: Batch, arm: str) -> Tensor:
    """(B, A) int64 on the CPU: the likeliest token after the right ones before it."""
    attachment = get_attachment(model)
    num_answer = batch.answers.shape[1]
    with read_memory(attachment, 0 if arm == "off" else None):
        cache, question = read_filler(model, batch)
        parts = []
        # An answer may begin a segment after the question.
        for piece in question.split(attachment.settings.segment_len, dim=1):
            logits = model(
                input_ids=piece.to(model.device),
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=num_answer,
            ).logits
            parts.append(logits.argmax(-1).cpu())
    return torch.cat(parts, 1)[:, -num_answer:]


def is_right(tokenizer: PreTrainedTokenizerBase, sample: PasskeySample, said: list[int]) -> bool:
    """Whether greedy decoding would have said the key, and no longer number."""
    return said[:-1] == sample.answer[:-1] and sample.is_right(str(tokenizer.decode(said)))


def test(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    start_token: int,
    arm: str,
    num_tokens: int,
    path: Path,
    options: argparse.Namespace,
) -> None:
    """Ask for the keys of all documents of one length, and write what was answered to a file."""
    began, answers = time.perf_counter(), []
    for samples in draw_tests(tokenizer, num_tokens, options):
        said = answer(model, make_batch(samples, start_token), arm).tolist()
        answers += [
            {
                "depth": sample.depth,
                "key": sample.key,
                "said": tokenizer.decode(tokens),
                "right": is_right(tokenizer, sample, tokens),
                "digits_right": sum(
                    a == b for a, b in zip(tokens[1:-1], sample.answer[1:-1], strict=True)
                ),
            }
            for sample, tokens in zip(samples, said, strict=True)
        ]
        num_right = sum(bool(one["right"]) for one in answers)
        print(
            f"{arm}, {num_tokens:,} tokens: {num_right} of {len(answers)} right, "
            f"{time.perf_counter() - began:.0f} s",
            flush=True,
        )
    seconds = time.perf_counter() - began
    values = {"arm": arm, "tokens": num_tokens, "seconds": seconds, "answers": answers}
    write_json(path, values | {"machine": describe_machine()})


def draw_tests(
    tokenizer: PreTrainedTokenizerBase, num_tokens: int, options: argparse.Namespace
) -> Iterator[list[PasskeySample]]:
    """The test documents of one length, as many as are read side by side at a time."""
    answer_len = len(draw_sample(tokenizer, 256, 0.0, "0", "test").answer)
    grid = make_grid(tokenizer, [num_tokens - answer_len], DEPTHS, options.samples)
    while samples := list(itertools.islice(grid, options.rows)):
        yield samples


def report(options: argparse.Namespace) -> None:
    """Write all that is tested so far to the JSON."""
    found = [
        json.loads(path.read_text(encoding="utf-8"))
        for path in options.runs.glob(f"*-{options.seed}.json")
    ]
    values = {
        "precision": describe_precision(options.device),
        "settings": SETTINGS.to_dict() | {"steps": options.steps, "seed": options.seed},
        "train_segments": list(TRAIN_SEGMENTS),
        "arms": {
            arm: {
                str(one["tokens"]): describe_test(one)
                for one in sorted(found, key=lambda one: one["tokens"])
                if one["arm"] == arm
            }
            for arm in ARMS
        },
        "command": shlex.join(["python", *sys.argv]),
    }
    write_json(options.json, values)


def describe_test(values: dict[str, Any]) -> dict[str, Any]:
    """Shares of right answers with their intervals, in all and by depth."""
    answers = values["answers"]
    depths = sorted({one["depth"] for one in answers})
    num_right, num_digits = (sum(one[key] for one in answers) for key in ("right", "digits_right"))
    return {
        "asked": len(answers),
        "right": num_right,
        "share": num_right / len(answers),
        "interval": list(compute_wilson_interval(num_right, len(answers))),
        "share_of_digits": num_digits / sum(len(one["key"]) for one in answers),
        "by_depth": {
            str(depth): [
                sum(one["right"] for one in answers if one["depth"] == depth),
                sum(one["depth"] == depth for one in answers),
            ]
            for depth in depths
        },
        "seconds": values["seconds"],
        "machine": values["machine"],
    }


if __name__ == "__main__":
    sys.exit(main())
