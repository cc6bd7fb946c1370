"""How fast this machine trains and evaluates the demo's model, from a few steps of it."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import torch

from memorizing.benchmark.preparing import DTYPES
from memorizing.config import Config
from memorizing.devices import synchronize
from memorizing.knn import multiplies_bf16
from memorizing.loss import sum_nats
from memorizing.model import MemorizingTransformer, ModelState
from memorizing.training.optimizer import Optimizer, group_parameters

REPEATS = 2
"""Of every step, after a first one that fills caches and buffers."""


@dataclass(frozen=True)
class Speed:
    """Seconds on one machine, in the precision that is faster there."""

    precision: Literal["fp32", "bf16"]
    reason: str
    """Why this one, for the user."""
    train_s: float
    """A step of training of both models, one with a full memory and one without."""
    read_s: float
    """A token read without a memory."""
    retrieve_s: float
    """What it costs more to retrieve for a token, however little is stored."""
    entry_s: float
    """What it costs more for every entry that is searched for a token."""


def measure_speed(config: Config, device: torch.device) -> Speed:
    """Time steps of both models with full caches and memories.

    bf16 is timed only where the device multiplies it: elsewhere a step would take most of a minute.

    Leaves torch's global generator as it was.
    """
    with torch.random.fork_rng(devices=[]):
        model = MemorizingTransformer(config.model).to(device)
    groups = group_parameters(model, [model.embedding.weight], model.memory_parameters())
    optimizer = Optimizer(groups, config.training)
    rows, capacity = config.training.rows, config.model.capacity

    def train(name: str, capacity: int) -> float:
        model.compute_dtype = DTYPES[name]
        return _time_step(model, rows, capacity, optimizer)

    setting = config.training.precision
    names = ["fp32", "bf16"] if setting == "auto" and multiplies_bf16(device) else ["fp32"]
    steps = {name: train(name, capacity) for name in (names if setting == "auto" else [setting])}
    precision = min(steps, key=lambda name: steps[name])
    train_s = steps[precision] + train(precision, 0)
    if setting != "auto":
        reason = "as set"
    elif len(steps) == 1:
        reason = "this processor does not multiply bf16 itself"
    else:
        slower = max(steps, key=lambda name: steps[name])
        reason = f"{steps[slower] / steps[precision]:.1f} times as fast as {slower} here"

    rows = config.evaluation.rows
    few = max(config.model.num_neighbors, capacity // 16)
    none_s, few_s, full_s = (
        _time_step(model, rows, size) / (rows * config.model.segment_len)
        for size in (0, few, capacity)
    )
    entry_s = max(0.0, full_s - few_s) / max(1, capacity - few)
    return Speed(
        "bf16" if precision == "bf16" else "fp32",
        reason,
        train_s,
        none_s,
        max(0.0, few_s - few * entry_s - none_s),
        entry_s,
    )


def _time_step(
    model: MemorizingTransformer, rows: int, capacity: int, optimizer: Optimizer | None = None
) -> float:
    """Seconds of one step over a segment of every row, with a full memory.

    With an optimizer a step of training, which changes the weights.
    """
    config = model.config
    device = model.embedding.weight.device
    tokens = torch.zeros(rows, config.segment_len, dtype=torch.int64, device=device)
    state = model.init_state(rows, capacity)
    # Full memories of rows that have read as much: what they hold does not matter for the time.
    num_read = -(-capacity // config.segment_len) * config.segment_len
    for memory in state.memories.values():
        memory.num_appended.fill_(num_read)
    state = replace(state, position=torch.full((rows,), num_read))

    def step(state: ModelState) -> ModelState:
        with torch.set_grad_enabled(optimizer is not None):
            output = model(tokens, state)
        if optimizer is not None:
            targets = torch.ones_like(tokens, dtype=torch.bool)
            (sum_nats(output.logits, tokens, targets) / tokens.numel()).backward()
            optimizer.step()
            optimizer.zero_grad()
        synchronize(device)
        return output.state.commit()

    return _take_mean(step, state)


def _take_mean(step: Callable[[ModelState], ModelState], state: ModelState) -> float:
    """Mean seconds of the repetitions: what else the machine does is part of what it can do."""
    state = step(state)
    start = time.perf_counter()
    for _ in range(REPEATS):
        state = step(state)
    return (time.perf_counter() - start) / REPEATS
