"""Passkeys that SmolLM2 finds in its memory, 64K tokens back, after finetuning on short documents.

    python experiments/pretrained/convert.py
    python experiments/pretrained/passkey_test.py        # goes on where it stopped

Documents are those of `passkey.py`: other sentences and keys in the tests than in training.

**Training.** LoRA, gates and scales, as `memorizing finetune` trains them, on documents of at most
6K tokens, each read anew with a memory of its own, 8 side by side: all of it but the last segment
without gradient, then the last one, whose loss counts the answer only.

**Test.** `memory` is what a user does: `memory.read` takes in the document but for its last 512
tokens, which end in the question, and `generate` goes on from these, greedily. `off` is the same
weights without memory; they get the document itself, segment by segment, with their local
attention's window of 512 tokens and the first four. Every layer looks 512 tokens further back, so
that tokens out of the reach of all layers cannot matter: they are left out. An answer is right when
it is the key, with no further digit. Keys stand at depths from 0 to 0.8, out of the window's sight
at all lengths.

Answers are kept one by one in `runs/pretrained/passkey`; the JSON holds what is there.
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
from command_line import make_parser, run_command
from passkey import KEY_SENTENCE, PasskeySample, encode, load_sentences, make_grid, make_sample
from smollm import describe_precision, load_smollm
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from memorizing import add_memory, load_adapter, open_memory
from memorizing.benchmark.preparing import describe_machine
from memorizing.errors import ConfigError
from memorizing.evaluation.answers import compute_wilson_interval
from memorizing.huggingface.attaching.attachment import get_attachment
from memorizing.huggingface.learning.adapter import save_adapter
from memorizing.huggingface.sessions.scoring import read_memory
from memorizing.loss import sum_nats
from memorizing.storage.files import write_json
from memorizing.training.finetuning import FinetuneSettings
from memorizing.training.finetuning.finetuner import group_weights, prepare_weights
from memorizing.training.optimizer import Optimizer

RESULTS = Path("experiments/results/pretrained_passkey.json")
RUNS = Path("runs/pretrained/passkey")
SETTINGS = FinetuneSettings(train="lora", steps=24, rows=8, warmup_steps=4, evaluate_every=0)
"""LoRA and gates at their usual rates."""
TRAIN_SEGMENTS = (2, 3, 5, 8, 12)
"""Of the documents of a step, drawn: 1K to 6K tokens. A tenth of the longest test."""
FIRST_SEGMENTS = TRAIN_SEGMENTS[:2]
"""In the first two thirds of the steps, which then take half of the time."""
LAYER = 18
"""The memory layer, of 30. Untrained, each by itself, on six training documents of 1,500 tokens:
this one gets 60% of the answers' tokens right, seven others 7 to 12%."""
SEGMENT_LEN = 512
TRAINED = "passkey.json"
"""What it was trained with, in the folder of the adapter."""
TEST_LENS = (4096, 8192, 16_384, 32_768, 65_536)
"""Tokens with the start token and the answer, in the order of the JSON."""
DEPTHS = tuple(place / 10 for place in range(9))
"""At 4,096 tokens and a depth of 0.8 the key is 800 tokens back: no window of 512 sees it."""
SAMPLES = 6
"""Of each length at each depth: 54."""
ARMS = ("memory", "off")
_SHOW_EVERY = 2


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
    parser.add_argument("--seed", type=int, default=0, help="of the training")
    parser.add_argument("--runs", type=Path, default=RUNS)
    parser.add_argument("--json", type=Path, default=RESULTS)
    return parser.parse_args()


def measure(options: argparse.Namespace) -> None:
    """Train where there is no adapter yet, then test length after length."""
    tokenizer = AutoTokenizer.from_pretrained(options.model, trust_remote_code=False)
    adapter = options.runs / f"adapter-{options.seed}"
    if not adapter.is_dir():
        train(tokenizer, adapter, options)
    about = adapter / TRAINED
    trained = json.loads(about.read_text(encoding="utf-8"))
    if trained != describe_training(options):
        raise ConfigError(
            f"{adapter} was trained with {trained}, and asked for is {describe_training(options)}; "
            "give the same --steps and --seed, or another --runs"
        )
    model, own_tokenizer = load_smollm(options.model, options.device)
    load_adapter(model, adapter, capacity=max(options.lens))
    for arm, num_tokens in itertools.product(options.arms, options.lens):
        test(model, tokenizer, own_tokenizer.start_token, arm, num_tokens, options)
    report(options)


def train(tokenizer: PreTrainedTokenizerBase, adapter: Path, options: argparse.Namespace) -> None:
    """Finetune the base model, and save what was learned."""
    model, own_tokenizer = load_smollm(options.model, options.device)
    capacity = max(TRAIN_SEGMENTS) * SEGMENT_LEN
    add_memory(model, layers=[LAYER], window=SEGMENT_LEN, capacity=capacity, read="entries")
    attachment = get_attachment(model)
    settings = make_settings(options)
    torch.manual_seed(settings.seed)
    prepare_weights(model, attachment, settings)
    optimizer = Optimizer(group_weights(model, attachment), settings.make_training_config())
    rng, began = random.Random(settings.seed), time.perf_counter()
    recent: list[tuple[float, float]] = []
    for step in range(1, settings.steps + 1):
        batch = draw_batch(tokenizer, own_tokenizer.start_token, step, rng, settings)
        optimizer.zero_grad()
        recent.append(learn(model, batch))
        optimizer.clip_gradients(settings.clip_norm)
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
    write_json(unfinished / TRAINED, describe_training(options))
    unfinished.rename(adapter)


def make_settings(options: argparse.Namespace) -> FinetuneSettings:
    """How the asked adapter is trained."""
    return replace(SETTINGS, steps=options.steps, seed=options.seed)


def describe_training(options: argparse.Namespace) -> dict[str, Any]:
    """What an adapter depends on, for JSON."""
    return {
        "settings": make_settings(options).to_dict(),
        "train_segments": list(TRAIN_SEGMENTS),
        "layer": LAYER,
    }


def draw_batch(
    tokenizer: PreTrainedTokenizerBase,
    start_token: int,
    step: int,
    rng: random.Random,
    settings: FinetuneSettings,
) -> Batch:
    """Training documents of one length, keys anywhere in them.

    The last segment holds the question: it is at least an eighth of a segment.
    """
    is_first = step <= settings.steps * 2 // 3
    num_segments = rng.choice(FIRST_SEGMENTS if is_first else TRAIN_SEGMENTS)
    spared = rng.randrange(SEGMENT_LEN * 7 // 8)
    samples = []
    for row in range(settings.rows):
        seed = f"{settings.seed}/{step}/{row}"
        num_tokens = num_segments * SEGMENT_LEN - spared
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


def read_and_ask(
    model: Any, tokenizer: PreTrainedTokenizerBase, start_token: int, sample: PasskeySample
) -> list[int]:
    """What a model with memory goes on with after a document it has read, but for its end."""
    num_prompt = get_attachment(model).settings.segment_len
    begin = len(sample.tokens) - num_prompt
    key_end = sample.key_position + len(encode(tokenizer, KEY_SENTENCE.format(key=sample.key)))
    if key_end > begin:
        raise ConfigError(
            f"the key stands up to token {key_end} of {len(sample.tokens)}, where the prompt "
            f"begins at {begin}: no memory is needed to see it; test longer documents"
        )
    # The start token in the text: this tokenizer puts none before a document.
    text = tokenizer.decode([start_token, *sample.tokens[:begin]])
    with open_memory(model) as memory:
        memory.read(tokenizer, {"document": text}, progress=False)
        return go_on(model, [start_token, *sample.tokens[begin:]], len(sample.answer))


def ask_without_memory(
    model: Any, start_token: int, sample: PasskeySample, *, cut: bool = True
) -> list[int]:
    """What a model without memory goes on with after a document.

    Args:
        model: with a memory, which is not read.
        start_token: precedes the document.
        sample: the document.
        cut: leave out what is out of the reach of all layers together.
    """
    attachment = get_attachment(model)
    settings = attachment.settings
    tokens = [start_token, *sample.tokens]
    reach = settings.window * (model.config.num_hidden_layers + 1)
    # After so many tokens positions begin anew, and with them the distance of the first tokens.
    period = attachment.decoder.max_positions - settings.window
    num_left_out = (len(tokens) - settings.num_sinks - reach) // period * period
    if cut and num_left_out > 0:
        tokens = [
            *tokens[: settings.num_sinks],
            *tokens[settings.num_sinks + num_left_out :],
        ]
    with read_memory(attachment, 0):
        return go_on(model, tokens, len(sample.answer))


def go_on(model: Any, tokens: list[int], num_tokens: int) -> list[int]:
    """The likeliest tokens after a text."""
    prompt = torch.tensor([tokens], device=model.device)
    written = model.generate(
        input_ids=prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=num_tokens,
        do_sample=False,
        pad_token_id=tokens[0],
    )
    return written[0, prompt.shape[1] :].tolist()


def test(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    start_token: int,
    arm: str,
    num_tokens: int,
    options: argparse.Namespace,
) -> None:
    """Ask for the keys of all documents of one length that were not asked for yet."""
    path = options.runs / f"{arm}-{num_tokens}-{options.seed}.json"
    values: dict[str, Any] = {"arm": arm, "tokens": num_tokens, "seconds": 0.0, "answers": []}
    if path.is_file():
        values = json.loads(path.read_text(encoding="utf-8"))
    answers = values["answers"]
    for sample in itertools.islice(draw_tests(tokenizer, num_tokens, options), len(answers), None):
        began = time.perf_counter()
        said = (
            read_and_ask(model, tokenizer, start_token, sample)
            if arm == "memory"
            else ask_without_memory(model, start_token, sample)
        )
        text = str(tokenizer.decode(said))
        answers.append(
            {
                "depth": sample.depth,
                "key": sample.key,
                "said": text,
                "right": sample.is_right(text),
                "digits_right": sum(a == b for a, b in zip(text.strip(), sample.key, strict=False)),
            }
        )
        values["seconds"] += time.perf_counter() - began
        write_json(path, values | {"machine": describe_machine()})
        report(options)
        num_right = sum(bool(one["right"]) for one in answers)
        print(
            f"{arm}, {num_tokens:,} tokens: {num_right} of {len(answers)} right, "
            f"{values['seconds']:.0f} s",
            flush=True,
        )


def draw_tests(
    tokenizer: PreTrainedTokenizerBase, num_tokens: int, options: argparse.Namespace
) -> Iterator[PasskeySample]:
    """The test documents of one length with start token and answer, depths taken in turns."""
    answer_len = len(draw_sample(tokenizer, 256, 0.0, "0", "test").answer)
    return make_grid(tokenizer, [num_tokens - answer_len], DEPTHS, options.samples)


def report(options: argparse.Namespace) -> None:
    """Write all that is tested so far to the JSON."""
    found = [
        json.loads(path.read_text(encoding="utf-8"))
        for path in options.runs.glob(f"*-{options.seed}.json")
    ]
    values = {
        "precision": describe_precision(options.device),
        **describe_training(options),
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
