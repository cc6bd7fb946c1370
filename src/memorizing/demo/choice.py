"""How much of its recipe the demo trains and evaluates, so that it ends in time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from memorizing.config import Config
from memorizing.demo.probe import Speed

READ_AGAIN = 8192
"""Tokens of each document among which those are chosen whose retrieval is shown."""
NUM_EXAMPLES = 5
LENGTH_STEP = 2048
FEWEST_TOKENS = 2 * LENGTH_STEP
"""Of each document, at least, where a machine cannot read them whole in time."""
EVALUATION_SHARE = 0.35
"""Of the time, at most: the rest trains."""
SHARE_PLANNED = 0.9
"""Of the time: steps on a shared machine are not all as long as those that were measured."""
FEWEST_STEPS = 60
"""Fewer teach nothing that could be shown."""


@dataclass(frozen=True)
class Choice:
    """What is trained and evaluated, and the seconds it is expected to take."""

    config: Config
    train_s: float
    evaluate_s: float
    is_in_time: bool
    """False where even the least takes longer."""


def choose_work(
    config: Config, lengths: Sequence[int], speed: Speed, time_s: float | None
) -> Choice:
    """The longest beginnings of documents, and the most training, that end in time.

    Evaluation gets a multiple of `LENGTH_STEP` tokens of each document, as many as take at most
    `EVALUATION_SHARE` of the time. Training gets the rest, up to the steps of the recipe, with as
    large a share of warm-up. The same arguments give the same choice, and what is slower in all
    never does more.

    Args:
        config: the whole recipe.
        lengths: tokens of the documents that are evaluated.
        speed: of the machine.
        time_s: for training and evaluation; None is as long as the recipe takes.
    """
    whole = config.evaluation.max_tokens_per_document
    training = config.training
    chosen, steps = shorten_documents(config, lengths, whole), training.steps
    evaluate_s = estimate_evaluation(chosen, lengths, speed)
    if time_s is not None:
        planned_s = time_s * SHARE_PLANNED
        share_s = evaluate_s
        limit = max(cut_length(length, whole) for length in lengths) // LENGTH_STEP * LENGTH_STEP
        while evaluate_s > EVALUATION_SHARE * planned_s and limit >= FEWEST_TOKENS:
            chosen = shorten_documents(config, lengths, limit)
            evaluate_s = estimate_evaluation(chosen, lengths, speed)
            share_s = max(evaluate_s, EVALUATION_SHARE * planned_s)
            limit -= LENGTH_STEP
        steps = min(steps, max(int((planned_s - share_s) / speed.train_s), FEWEST_STEPS))
    training = replace(
        training,
        steps=steps,
        warmup_steps=round(training.warmup_steps * steps / training.steps),
        precision=speed.precision,
    )
    train_s = steps * speed.train_s
    is_in_time = time_s is None or train_s + evaluate_s <= time_s
    return Choice(replace(chosen, training=training), train_s, evaluate_s, is_in_time)


def shorten_documents(config: Config, lengths: Sequence[int], limit: int) -> Config:
    """Evaluate the first `limit` tokens of each document (0 all), with sizes that differ there."""
    longest = cut_length(max(lengths), limit)
    sizes = sorted(config.evaluation.capacities)
    num_smaller = sum(size < longest for size in sizes)
    evaluation = replace(
        config.evaluation,
        max_tokens_per_document=limit,
        capacities=tuple(sizes[: num_smaller + 1]),  # the last one holds any document
    )
    return replace(config, evaluation=evaluation)


def estimate_evaluation(config: Config, lengths: Sequence[int], speed: Speed) -> float:
    """Seconds to read the documents with each memory, and some again for the examples."""
    evaluation, segment_len = config.evaluation, config.model.segment_len
    cut = [cut_length(length, evaluation.max_tokens_per_document) for length in lengths]
    largest = max(evaluation.capacities)
    # Cache only; every size; the controls: `off` reads without memory, the others with the largest.
    sizes = [0, *evaluation.capacities]
    sizes += [0 if control == "off" else largest for control in evaluation.controls]

    def read(length: int, size: int) -> float:
        begins = np.arange(segment_len, length, segment_len)
        tokens = np.minimum(segment_len, length - begins)  # of a segment that can retrieve
        retrieve_s = tokens @ (speed.retrieve_s + speed.entry_s * np.minimum(begins, size))
        return length * speed.read_s + (float(retrieve_s) if size else 0.0)

    again = sorted(cut)[-NUM_EXAMPLES:]
    return sum(read(length, size) for length in cut for size in sizes) + sum(
        read(min(length, READ_AGAIN), largest) for length in again
    )


def cut_length(length: int, limit: int) -> int:
    """Tokens that are read of a document; a limit of 0 is none."""
    return min(length, limit or length)
