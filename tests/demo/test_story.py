"""What the demo says of the machine and of its choice."""

import io
import shlex
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from memorizing.config import load_config
from memorizing.demo.choice import choose_work
from memorizing.demo.probe import Speed
from memorizing.demo.story import announce, point_to

CONFIG = load_config("demo")
LENGTHS = [6_007, 11_003, 23_011, 52_009]
FAST = Speed("bf16", "2.3 times as fast as fp32 here", 0.14, 2e-5, 1e-5, 1e-9)
SLOW = Speed("fp32", "this processor does not multiply bf16 itself", 1.3, 2e-4, 3e-4, 1e-8)
VERY_SLOW = replace(SLOW, train_s=7.0)


def read(what):
    page = io.StringIO()
    Console(file=page, width=80).print(what)
    return " ".join(page.getvalue().split())


@pytest.mark.parametrize(
    ("speed", "minutes", "expected"),
    [
        (
            FAST,
            10.0,
            "takes 0.14 seconds in bf16 (2.3 times as fast as fp32 here). To end within 10 "
            "minutes, each model reads {tokens} of 11,400,000 training tokens (all 1,000 steps of "
            "the recipe), and is then measured on 4 documents, 92,030 tokens in all: model folders "
            "of the transformers package that neither saw. That will take about 2.8 minutes from "
            "now, 2.3 minutes of it training.",
        ),
        (
            SLOW,
            10.0,
            "(this processor does not multiply bf16 itself). To end within 10 minutes, each model "
            "reads {tokens} of 11,400,000 training tokens ({steps} of the recipe's 1,000 steps), "
            "and is then measured on the first {limit} tokens of 4 documents, {num_test} tokens",
        ),
        (
            VERY_SLOW,
            10.0,
            "Less would not show anything, so it takes longer than the 10 minutes that were asked "
            "for",
        ),
        (VERY_SLOW, 0.0, "As the recipe says, each model reads {tokens} of 11,400,000 training"),
    ],
)
def test_the_announcement_says_what_is_done_why_and_how_long_it_takes(speed, minutes, expected):
    choice = choose_work(CONFIG, LENGTHS, speed, 60 * minutes or None)
    training, limit = choice.config.training, choice.config.evaluation.max_tokens_per_document
    tokens = training.steps * training.rows * CONFIG.model.segment_len
    num_test = sum(min(length, limit) for length in LENGTHS)
    said = read(announce(CONFIG, choice, 11_400_000, LENGTHS, speed, minutes))
    expected = expected.format(
        tokens=f"{tokens:,}", steps=training.steps, limit=f"{limit:,}", num_test=f"{num_test:,}"
    )
    assert expected in said
    assert ("longer than" in said) == (not choice.is_in_time)


def test_the_end_says_how_long_it_took_and_gives_commands_to_copy():
    run = Path("runs/a demo of mine, in a folder whose name is longer than a terminal is wide")
    said, commands = point_to(run, 571.0, 312.0, 61.0)
    assert "This took 9.5 minutes: 5.2 minutes of training and 60 seconds of" in read(said)
    page = io.StringIO()
    Console(file=page, width=80).print(commands, soft_wrap=True)
    lines = page.getvalue().replace("\\\n", "").splitlines()
    memory = f"{run}/memory"
    assert [words for line in lines if (words := shlex.split(line, comments=True))] == [
        ["memorizing", "evaluate", memory]
        + ["--against", f"{run}/cache_only", "--corpus", "files:PATH"],
        ["memorizing", "demo", "--recipe", f"{memory}/config.toml"]
        + ["--minutes", "0", "--run", "runs/again"],
        ["memorizing", "demo", "--minutes", "0"],
        ["memorizing", "train", "small", "--run", "runs/small"],
    ]
