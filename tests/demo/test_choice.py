"""How much the demo does on fast and on slow machines: a function of measured seconds."""

from dataclasses import replace

import pytest

from memorizing.config import load_config
from memorizing.demo.choice import (
    EVALUATION_SHARE,
    FEWEST_STEPS,
    FEWEST_TOKENS,
    SHARE_PLANNED,
    choose_work,
    estimate_evaluation,
    shorten_documents,
)
from memorizing.demo.probe import Speed

CONFIG = load_config("demo")
LENGTHS = [6_007, 11_003, 23_011, 52_009]
FAST = Speed("bf16", "", train_s=0.14, read_s=2e-5, retrieve_s=1e-5, entry_s=1e-9)


def slow_down(factor):
    seconds = {name: getattr(FAST, name) * factor for name in ("train_s", "read_s", "retrieve_s")}
    return replace(FAST, **seconds, entry_s=FAST.entry_s * factor)


def choose(factor, time_s=600.0):
    return choose_work(CONFIG, LENGTHS, slow_down(factor), time_s)


def test_a_fast_machine_trains_the_whole_recipe_and_reads_whole_documents():
    choice = choose(1)
    assert choice.is_in_time
    expected = replace(CONFIG, training=replace(CONFIG.training, precision="bf16"))
    assert choice.config == expected
    assert choice.train_s == pytest.approx(CONFIG.training.steps * 0.14)


def test_a_slow_machine_trains_fewer_steps_and_reads_beginnings():
    choice = choose(8)
    steps = choice.config.training.steps
    assert steps == int(600 * SHARE_PLANNED * (1 - EVALUATION_SHARE) / (8 * 0.14))
    assert choice.config.training.warmup_steps == round(
        CONFIG.training.warmup_steps * steps / CONFIG.training.steps
    )
    limit = choice.config.evaluation.max_tokens_per_document
    assert FEWEST_TOKENS <= limit < max(LENGTHS)
    assert limit % 2048 == 0
    share_s = EVALUATION_SHARE * SHARE_PLANNED * 600
    longer = shorten_documents(CONFIG, LENGTHS, limit + 2048)
    assert choice.evaluate_s <= share_s < estimate_evaluation(longer, LENGTHS, slow_down(8))
    assert choice.is_in_time


def test_a_very_slow_machine_does_the_least_that_shows_something_and_says_so():
    choice = choose(100)
    assert choice.config.training.steps == FEWEST_STEPS
    assert choice.config.evaluation.max_tokens_per_document == FEWEST_TOKENS
    assert choice.train_s == pytest.approx(FEWEST_STEPS * 14)
    assert not choice.is_in_time
    assert choose(100, 0.0).config == choice.config


def test_a_slower_machine_never_does_more_and_promises_are_kept_until_the_least():
    steps, limits = [], []
    for number in range(60):
        choice = choose(1.1**number)
        limit = choice.config.evaluation.max_tokens_per_document
        steps.append(choice.config.training.steps)
        limits.append(limit or max(LENGTHS))
        seconds = choice.train_s + choice.evaluate_s
        assert choice.is_in_time == (seconds <= 600)
        if steps[-1] > FEWEST_STEPS:
            assert seconds <= 600 * SHARE_PLANNED
    assert steps == sorted(steps, reverse=True)
    assert limits == sorted(limits, reverse=True)
    assert len(set(steps)) > 20
    assert len(set(limits)) > 10


def test_without_a_limit_of_time_it_is_the_recipe():
    choice = choose(100, None)
    assert choice.config.training.steps == CONFIG.training.steps
    assert choice.config.evaluation == CONFIG.evaluation
    assert choice.is_in_time


def test_sizes_that_would_read_the_same_are_left_out():
    sizes = CONFIG.evaluation.capacities
    assert sizes == (512, 2048, 8192, 65_536)
    for limit, expected in ((2048, sizes[:2]), (2049, sizes[:3]), (8192, sizes[:3]), (0, sizes)):
        found = shorten_documents(CONFIG, LENGTHS, limit).evaluation
        assert (found.capacities, found.max_tokens_per_document) == (expected, limit)


def test_the_seconds_of_an_evaluation_are_those_of_all_memories_and_examples():
    config = CONFIG.replace(
        ["model.segment_len=10", "evaluation.capacities=[40]", 'evaluation.controls=["off"]']
    )
    speed = Speed("fp32", "", train_s=1.0, read_s=7.0, retrieve_s=3.0, entry_s=0.5)
    # 25 tokens with a memory: 10 find it empty, 10 search 10 entries, 5 search 20.
    reads, retrieves = 25 * 7.0, 15 * 3.0 + (10 * 10 + 5 * 20) * 0.5
    # Cache only, 40 entries, off; then once more for the examples.
    expected = 3 * reads + retrieves + reads + retrieves
    assert estimate_evaluation(config, [25], speed) == pytest.approx(expected)
