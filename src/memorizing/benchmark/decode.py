"""What memory adds to decoding: one new token at a time, one row, weights in bf16.

Tokens with and without memory and searches alone are interleaved. They are those of one segment,
decoded again from its start where more are asked for: nothing is committed, so that a memory that
was sealed stays so. (Committing, once in `segment_len` tokens, is timed by `benchmark step`.)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from memorizing.benchmark.indexes import ReplayingIndex, build_index
from memorizing.benchmark.preparing import (
    DEFAULT_PRECISION,
    DTYPES,
    check_arguments,
    describe_benchmark,
    fill_state,
)
from memorizing.benchmark.recording import Recording
from memorizing.benchmark.timing import time_interleaved
from memorizing.benchmark.verification import check_memory
from memorizing.config import ModelConfig
from memorizing.errors import ConfigError
from memorizing.index_settings import parse_index
from memorizing.knn import make_index
from memorizing.model import MemorizingTransformer, ModelState
from memorizing.model.block import normalize

_MIN_QUERIES = 64
"""Per head, to measure recall by, however few tokens are timed."""


def benchmark_decode(
    config: ModelConfig,
    entries: int = 65_536,
    num_pairs: int = 100,
    num_warmup: int = 5,
    precision: str = DEFAULT_PRECISION,
    *,
    index: str = "exact",
    recording: Recording | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Time decoding one token with a full memory against decoding it without memory.

    The model has random weights. With a recording, the memory holds recorded keys (its last
    `entries`) and is searched for recorded queries in the place of the model's own, by a
    `ReplayingIndex`; else both are random and of length 1, the worst case of an approximate index.
    A recording with fewer heads than the model is repeated over the heads. At most the first half
    of its queries is replayed; an index that is trained on queries sees the others. Every memory is
    sealed before it is timed. Seeds torch's global generator.

    Args:
        config: the model.
        entries: capacity of every memory, filled to the last slot.
        num_pairs: interleaved tokens after `num_warmup` untimed ones.
        num_warmup: tokens that are not counted.
        precision: `bf16` or `fp32`, of weights, activations and products.
        index: what searches the memories, as `parse_index` reads it.
        recording: real keys and queries.
        on_progress: called with repetitions done and in all.

    Returns:
        `rows`: `no_memory`, `memory`, and `search` (the searches of one token alone, for other
        queries than the tokens before and after), each with `name`, `entries`, `seconds` (median),
        `compared_with`, `ratio` and `added_s` (medians over pairs). The row `memory` also has
        `recall` (of the queries that are replayed, one by one), `build_s` (of the sealed indexes)
        and `index_mib` (growth of the process's resident memory while they were built, 0 where
        the index keeps nothing but the keys). Then the machine and the settings.

    Raises:
        ConfigError: a model without memory layers, a capacity that cannot be, another precision,
            an index that is not known, or a recording of another length of keys or fewer entries.
        IndexUnavailableError: the index needs a package that is not installed.
        MemorizingError: a search gives wrong results: no speed is reported then.
    """
    check_arguments(config, [entries], num_pairs, precision)
    settings = parse_index(index)
    make_index(settings)  # a package that is missing is said now, not after the memory is filled
    torch.manual_seed(0)
    dtype = DTYPES[precision]
    num_timed = max(_MIN_QUERIES, num_pairs + num_warmup)
    if recording is None:
        keys = None
        queries = normalize(torch.randn(config.num_heads, 2 * num_timed, config.head_dim))
    else:
        keys, queries = _fit_recording(recording, config, entries)
    middle = (queries.shape[1] + 1) // 2
    queries, other_queries = queries[:, : min(num_timed, middle)], queries[:, middle:]
    model = MemorizingTransformer(replace(config, capacity=entries)).to(dtype).eval()
    model.compute_dtype = dtype
    tokens = torch.randint(config.vocab_size, (1, config.segment_len))
    full = fill_state(model, tokens, entries, keys=keys)
    built = []
    for memory in full.memories.values():
        built.append(build_index(settings, memory.stored_keys, other_queries))
        memory.index = built[-1].index
    recall = min(
        check_memory(memory, queries, config.num_neighbors) for memory in full.memories.values()
    )
    states = {"no_memory": fill_state(model, tokens, 0), "memory": full}
    timings = time_interleaved(
        _make_arms(model, tokens, states, queries),
        num_pairs,
        num_warmup,
        on_progress=on_progress,
    )
    rows = [
        timings.compare(name, "no_memory") | {"entries": 0 if name == "no_memory" else entries}
        for name in timings.seconds
    ]
    rows[1] |= {
        "recall": recall,
        "build_s": sum(index.seconds for index in built),
        "index_mib": sum(index.resident_bytes for index in built) / 2**20,
    }
    return {
        **describe_benchmark("decode", model, precision, index, num_pairs),
        "recorded": None if recording is None else _describe(recording),
        "rows": rows,
    }


def _fit_recording(
    recording: Recording, config: ModelConfig, entries: int
) -> tuple[Tensor, Tensor]:
    """The last recorded keys (h, entries, D), and all queries (H, T, D), repeated over heads."""
    num_heads, num_recorded, head_dim = recording.keys.shape
    if head_dim != config.head_dim or num_recorded < entries:
        raise ConfigError(
            f"the recording has {num_recorded:,} entries of {head_dim} dimensions; decoding needs "
            f"{entries:,} of {config.head_dim}; record more, give fewer entries, or a recipe with "
            f"model.head_dim = {head_dim}"
        )
    # Queries follow the newest entry: the last entries are those that they would find.
    heads = torch.arange(config.num_heads) % num_heads
    return recording.keys[:, -entries:], recording.queries[heads]


def _make_arms(
    model: MemorizingTransformer, tokens: Tensor, states: dict[str, ModelState], queries: Tensor
) -> dict[str, Callable[[], None]]:
    """What is timed. Replaces the indexes of the memories by such as replay the queries."""
    segment_len, num_neighbors = model.config.segment_len, model.config.num_neighbors
    queries = queries.to(model.compute_dtype)
    # Other queries than those of the tokens around it, whose keys may still be in a cache.
    others = queries.roll(queries.shape[1] // 2, 1)
    alone = []
    for memory in states["memory"].memories.values():
        alone.append((ReplayingIndex(memory.index, others), memory))
        memory.index = ReplayingIndex(memory.index, queries)

    latest = dict(states)

    def read_token(name: str) -> None:
        place = int(latest[name].position[0]) % segment_len
        if place == 0:
            latest[name] = states[name]
        with torch.no_grad():
            latest[name] = model(tokens[:, place : place + 1], latest[name]).state

    def search() -> None:
        for index, memory in alone:
            index.search(queries[:, :1].unsqueeze(0), memory.stored_keys, num_neighbors)

    return {name: partial(read_token, name) for name in states} | {"search": search}


def _describe(recording: Recording) -> dict[str, Any]:
    num_heads, num_entries, _ = recording.keys.shape
    return recording.source | {
        "num_heads": num_heads,
        "num_entries": num_entries,
        "num_queries": recording.queries.shape[1],
    }
