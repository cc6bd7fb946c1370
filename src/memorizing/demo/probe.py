"""How long the demo will take on this machine, from a few steps of it."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from memorizing.config import Config
from memorizing.data import TokenizedDocument
from memorizing.devices import synchronize
from memorizing.loss import sum_nats
from memorizing.model import MemorizingTransformer, ModelState
from memorizing.training.optimizer import Optimizer, group_parameters


@dataclass(frozen=True)
class Estimate:
    """Seconds that the parts of the demo will take."""

    train_s: float
    evaluate_s: float

    @property
    def minutes(self) -> float:
        """All of it."""
        return (self.train_s + self.evaluate_s) / 60


def estimate_duration(
    config: Config,
    test: Sequence[TokenizedDocument],
    dtype: torch.dtype,
    device: torch.device,
) -> Estimate:
    """Time steps of both arms with full caches and memories, and count the steps to come.

    Leaves torch's global generator as it was.
    """
    with torch.random.fork_rng(devices=[]):
        model = MemorizingTransformer(config.model).to(device)
    model.compute_dtype = dtype
    longest = max(len(document.tokens) for document in test)
    rows, eval_rows = config.training.rows, config.evaluation.rows
    groups = group_parameters(model, [model.embedding.weight], model.memory_parameters())
    optimizer = Optimizer(groups, config.training)
    train_s = sum(
        _time_step(model, rows, capacity, optimizer) for capacity in (0, config.model.capacity)
    )
    segments = longest / config.model.segment_len
    # Cache only, memory off, every capacity; the two other controls cost what the largest does.
    capacities = [min(c, longest) for c in config.evaluation.capacities]
    evaluate_s = sum(
        # On the average over a document, a memory that never fills up is half full.
        _time_step(model, eval_rows, capacity if capacity < longest else longest // 2)
        for capacity in (0, 0, *capacities, max(capacities), max(capacities))
    )
    return Estimate(train_s * config.training.steps, evaluate_s * segments)


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

    return _take_fastest(step, state)


def _take_fastest(step: Callable[[ModelState], ModelState], state: ModelState) -> float:
    """The second of three repetitions: the first one fills caches and buffers."""
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        state = step(state)
        seconds.append(time.perf_counter() - start)
    return min(seconds[1:])
