"""What memory adds to a training step.

A step is forward, loss, backward and commit of one row of one segment, the optimizer left out. The
steps with and without memory are interleaved, so that a change of the machine's speed meets both,
and the median of the pairwise ratios is reported.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from memorizing.config import ModelConfig, check_capacity
from memorizing.errors import ConfigError, MemorizingError
from memorizing.loss import sum_nats
from memorizing.memory import Memory
from memorizing.model import MemorizingTransformer, ModelState
from memorizing.model.block import normalize


@dataclass(frozen=True)
class _Arm:
    name: str
    entries: int
    seconds: list[float]


def benchmark_step(
    config: ModelConfig,
    entries: Sequence[int] = (8192, 65_536),
    num_pairs: int = 20,
    num_warmup: int = 3,
    precision: str = "bf16",
    on_progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Time training steps with full memories of several sizes against the step without memory.

    The XL cache is full in every timed step, and so are the memories: with random entries of the
    right norm, as the search costs the same whatever it finds. Seeds torch's global generator.

    Args:
        config: the model; one row of `segment_len` tokens is timed.
        entries: capacities of 1 or more, each filled to the last slot.
        num_pairs: interleaved repetitions after `num_warmup` untimed ones.
        num_warmup: repetitions that are not counted.
        precision: `bf16` or `fp32`.
        on_progress: called with repetitions done and in all.

    Returns:
        `rows`, each with `name`, `entries`, `seconds` (median), `compared_with`, `ratio` (median of
        the pairwise ratios) and `added_s` (median of the pairwise differences), and the settings of
        the measurement.

    Raises:
        ConfigError: a model without memory layers, a capacity that cannot be, or another precision.
        MemorizingError: the search of this machine gives wrong results: no speed is reported then.
    """
    _check_arguments(config, entries, num_pairs, precision)
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    torch.manual_seed(0)
    model = MemorizingTransformer(replace(config, capacity=max(entries)))
    model.compute_dtype = dtype
    tokens = torch.randint(config.vocab_size, (1, config.segment_len + 1))
    sizes = [0, *entries]
    states = [_fill_state(model, tokens[:, :-1], capacity) for capacity in sizes]
    _check_search(states, config)
    arms = [_Arm("memory" if capacity else "no_memory", capacity, []) for capacity in sizes]
    total = num_warmup + num_pairs
    for repetition in range(total):
        for index, arm in enumerate(arms):
            start = time.perf_counter()
            states[index] = _run_step(model, states[index], tokens)
            if repetition >= num_warmup:
                arm.seconds.append(time.perf_counter() - start)
            model.zero_grad(set_to_none=True)
        if on_progress is not None:
            on_progress(repetition + 1, total)
    return {
        "benchmark": "step",
        "precision": precision,
        "num_pairs": num_pairs,
        "segment_len": config.segment_len,
        "parameters": sum(p.numel() for p in model.parameters()),
        "threads": torch.get_num_threads(),
        "rows": [_describe(arm, arms[0]) for arm in arms],
    }


def _check_arguments(
    config: ModelConfig, entries: Sequence[int], num_pairs: int, precision: str
) -> None:
    if not config.memory_layers:
        raise ConfigError(
            "the model has no memory layer to time; choose a recipe with model.memory_layers"
        )
    if not entries or min(entries) < 1 or num_pairs < 1:
        raise ConfigError(
            f"entries are {list(entries)} and num_pairs is {num_pairs}; give at least one capacity "
            "above 0 (the step without memory is always timed) and at least one pair"
        )
    for capacity in entries:
        check_capacity(capacity, config.num_neighbors)
    if precision not in ("bf16", "fp32"):
        raise ConfigError(f"precision is {precision!r}; allowed: 'bf16' and 'fp32'")


def _run_step(model: MemorizingTransformer, state: ModelState, tokens: Tensor) -> ModelState:
    output = model(tokens[:, :-1], state)
    targets = tokens[:, 1:]
    loss = (
        sum_nats(output.logits, targets, torch.ones_like(targets, dtype=torch.bool))
        / targets.numel()
    )
    loss.backward()
    return output.state.commit()


def _fill_state(model: MemorizingTransformer, tokens: Tensor, capacity: int) -> ModelState:
    """A state whose cache and memories are full."""
    state = model.init_state(1, capacity)
    with torch.no_grad():
        # Enough segments to fill the cache; the memories are then filled by hand.
        for _ in range(-(-model.config.window // model.config.segment_len)):
            state = model(tokens, state).state.commit()
    # The clock of a memory stands where its row stands: at the end of a segment.
    num_entries = -(-capacity // state.segment_len) * state.segment_len
    for memory in state.memories.values():
        _fill_memory(memory, num_entries)
    return replace(state, position=state.position + num_entries)


def _fill_memory(memory: Memory, num_entries: int) -> None:
    chunk = 8192
    num_rows, num_heads, _, head_dim = memory.keys.shape
    for start in range(0, num_entries, chunk):
        shape = (num_rows, num_heads, min(chunk, num_entries - start), head_dim)
        memory.append(normalize(torch.randn(shape)), torch.randn(shape))


def _check_search(states: Sequence[ModelState], config: ModelConfig) -> None:
    """Compare a sample of the search with a full sort in fp32."""
    for state in states:
        for memory in state.memories.values():
            queries = normalize(torch.randn(1, config.num_heads, 4, config.head_dim))
            found = memory.retrieve(queries, config.num_neighbors).neighbors
            rounded = queries.to(memory.keys.dtype).float()
            scores = torch.matmul(rounded, memory.keys[:1].float().transpose(-1, -2))
            kth = scores.topk(config.num_neighbors, dim=-1).values[..., -1:]
            rounding = torch.finfo(memory.keys.dtype).eps * kth.abs()
            if not bool((scores.gather(-1, found.slots) >= kth - rounding - 1e-6).all()):
                raise MemorizingError(
                    f"the search among {memory.capacity} entries returned wrong neighbors on this "
                    "machine, so no speed is "
                    "reported; please open an issue with the output of `memorizing info machine`"
                )


def _describe(arm: _Arm, baseline: _Arm) -> dict[str, Any]:
    pairs = list(zip(arm.seconds, baseline.seconds, strict=True))
    return {
        "name": arm.name,
        "entries": arm.entries,
        "seconds": statistics.median(arm.seconds),
        "compared_with": baseline.name,
        "ratio": statistics.median(own / base for own, base in pairs),
        "added_s": statistics.median(own - base for own, base in pairs),
    }
