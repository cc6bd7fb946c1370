"""What memory adds to a training step.

A step is forward, loss, backward and commit of one row of one segment, the optimizer left out. The
steps with and without memory, the bare products of the search and a large product are interleaved,
so that a change of the machine's speed meets all of them, and medians over pairs are reported.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from memorizing.benchmark.peak_memory import Peak, measure_peak
from memorizing.benchmark.preparing import (
    DEFAULT_PRECISION,
    DTYPES,
    check_arguments,
    describe_benchmark,
    fill_state,
    make_first_tokens,
    run_step,
)
from memorizing.benchmark.search_methods import make_product
from memorizing.benchmark.timing import Timings, time_interleaved
from memorizing.benchmark.verification import check_state
from memorizing.config import ModelConfig
from memorizing.index_settings import parse_index
from memorizing.memory import Entries, Memory
from memorizing.model import MemorizingTransformer, ModelState
from memorizing.model.block import normalize

_NUM_APPENDS = 100


def benchmark_step(
    config: ModelConfig,
    entries: Sequence[int] = (8192, 65_536),
    num_pairs: int = 20,
    num_warmup: int = 3,
    precision: str = DEFAULT_PRECISION,
    *,
    index: str = "exact",
    num_peaks: int = 0,
    large_dim: int = 2048,
    on_progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Time training steps with full memories of several sizes against the step without memory.

    The XL cache is full in every timed step, and so are the memories: with random entries of
    length 1. Exact search takes the same time whatever it finds. Seeds torch's global generator.

    Args:
        config: the model; one row of `segment_len` tokens is timed.
        entries: capacities of 1 or more, each filled to the last slot.
        num_pairs: interleaved repetitions after `num_warmup` untimed ones.
        num_warmup: repetitions that are not counted.
        precision: `bf16` or `fp32`, of activations and matrix products.
        index: what searches the memories, as `parse_index` reads it.
        num_peaks: also measure what a step holds at its peak, in as many fresh processes for each
            size, and take the median: they differ by some tens of MiB. 0 does not.
        large_dim: rows and columns of the large products behind the arithmetic limit.
        on_progress: called with repetitions done and in all.

    Returns:
        `rows`, first without memory, then one for each of `entries`, each with `name`, `entries`,
        `seconds` (median), `compared_with`, `ratio` (median of the pairwise ratios) and `added_s`
        (median of the pairwise differences). Rows with memory also have `recall` (on random
        queries); `product_s` (the bare products of queries and keys, of all heads and memory
        layers, into a reused buffer); `append_s` (committing one segment) and `append_ratio` (to
        the same with the fewest entries). Where asked for, all rows have `peak_mib` (most that was
        resident), `entries_mib` and `beyond_entries_mib` (the peak less that of the step without
        memory, less the entries).
        `limit` has the step's model FLOPs, the speed of large products in the step's precision,
        their quotient `limit_s`, and `share_of_limit`, which the step without memory reaches.
        Then the machine and the settings of the measurement.

    Raises:
        ConfigError: a model without memory layers, a capacity that cannot be, another precision,
            or an index that is not known.
        IndexUnavailableError: the index needs a package that is not installed.
        MemorizingError: the search of this machine gives wrong results: no speed is reported then.
    """
    sizes = [0, *dict.fromkeys(entries)]
    check_arguments(config, entries, num_pairs, precision)
    parse_index(index)
    peaks = _measure_peaks(config, sizes, precision, index, num_peaks) if num_peaks else {}
    torch.manual_seed(0)
    model = MemorizingTransformer(replace(config, capacity=max(entries)))
    model.compute_dtype = DTYPES[precision]
    tokens = torch.randint(config.vocab_size, (1, config.segment_len + 1))
    states = {size: fill_state(model, tokens[:, :-1], size, index) for size in sizes}
    recalls = {size: check_state(states[size], config) for size in sizes[1:]}

    def step(size: int) -> None:
        states[size] = run_step(model, states[size], tokens)

    large_product, large_flops = make_large_product(large_dim, model.compute_dtype)
    functions: dict[str, Callable[[], object]] = {
        **{_name("step", size): partial(step, size) for size in sizes},
        **{_name("product", size): _make_products(states[size], config) for size in sizes[1:]},
        "large_product": large_product,
    }
    timings = time_interleaved(
        functions,
        num_pairs,
        num_warmup,
        between=lambda: model.zero_grad(set_to_none=True),
        on_progress=on_progress,
    )
    del functions
    appends = _time_appends(states, sizes[1:], model.compute_dtype)
    rows = [_describe(timings, size) | peaks.get(size, {}) for size in sizes]
    for row, size in zip(rows[1:], sizes[1:], strict=True):
        append = appends.compare(_name("append", size), _name("append", min(sizes[1:])))
        row |= {
            "recall": recalls[size],
            "product_s": timings.compute_median(_name("product", size)),
            "append_s": append["seconds"],
            "append_ratio": append["ratio"],
        }
    return {
        **describe_benchmark("step", model, precision, index, num_pairs),
        "limit": _describe_limit(timings, count_step_flops(config), large_flops),
        "rows": rows,
    }


def _name(what: str, size: int) -> str:
    return f"{what} {size}"


def _make_products(state: ModelState, config: ModelConfig) -> Callable[[], None]:
    """The bare products of a step's searches; see `make_product`."""
    queries = torch.randn(config.num_heads, config.segment_len, config.head_dim).bfloat16()
    products = [
        make_product(queries, memory.keys[0].bfloat16()) for memory in state.memories.values()
    ]

    def multiply() -> None:
        for product in products:
            product()

    return multiply


def _time_appends(states: dict[int, ModelState], sizes: list[int], dtype: torch.dtype) -> Timings:
    """Time committing a segment to each memory. Changes the states in place."""

    def stage(size: int) -> None:
        state = states[size]
        staged = {layer: _stage(memory, state, dtype) for layer, memory in state.memories.items()}
        position = state.position + state.segment_len
        states[size] = replace(state, position=position, staged=staged)

    def commit(size: int) -> None:
        states[size] = states[size].commit()

    def stage_all() -> None:
        for size in sizes:
            if not states[size].staged:
                stage(size)

    stage_all()
    functions = {_name("append", size): partial(commit, size) for size in sizes}
    return time_interleaved(functions, _NUM_APPENDS, between=stage_all)


def _stage(memory: Memory, state: ModelState, dtype: torch.dtype) -> Entries:
    shape = (1, memory.keys.shape[1], state.segment_len, memory.keys.shape[3])
    keys, values = normalize(torch.randn(shape)).to(dtype), torch.randn(shape).to(dtype)
    valid = torch.ones(1, state.segment_len, dtype=torch.bool)
    return Entries(keys, values, valid, make_first_tokens(memory, state.segment_len))


def _measure_peaks(
    config: ModelConfig, sizes: list[int], precision: str, index: str, num_peaks: int
) -> dict[int, dict[str, Any]]:
    peaks: dict[int, Peak] = {}
    for size in sizes:
        found = [measure_peak(config, size, precision, index) for _ in range(num_peaks)]
        peaks[size] = sorted(found, key=lambda peak: peak.peak_bytes)[num_peaks // 2]
    base = peaks[0].peak_bytes
    return {
        size: {
            "beyond_entries_mib": (peak.peak_bytes - peak.entry_bytes - base) / 2**20,
            "entries_mib": peak.entry_bytes / 2**20,
            "peak_mib": peak.peak_bytes / 2**20,
            "peak_method": peak.method,
        }
        for size, peak in peaks.items()
    }


def _describe(timings: Timings, size: int) -> dict[str, Any]:
    row = timings.compare(_name("step", size), _name("step", 0))
    return row | {
        "name": "memory" if size else "no_memory",
        "entries": size,
        "compared_with": "no_memory",
    }


def _describe_limit(timings: Timings, step_flops: int, large_flops: int) -> dict[str, Any]:
    pairs = timings.list_pairs("large_product", _name("step", 0))
    product_s = timings.compute_median("large_product")
    return {
        "step_flops": step_flops,
        "product_tflops_per_s": large_flops / product_s / 1e12,
        "limit_s": step_flops / large_flops * product_s,
        "share_of_limit": statistics.median(
            step_flops / large_flops * product / step for product, step in pairs
        ),
    }


def count_window_pairs(segment_len: int, window: int, num_cached: int) -> int:
    """(query, key) pairs inside the causal window, over the tokens of one segment.

    Token i of the segment, counted from 0, sees itself, the i tokens before it and the cached ones,
    at most `window` in all: sum of min(window, num_cached + i + 1).
    """
    return sum(min(window, num_cached + place + 1) for place in range(segment_len))


def count_forward_flops(config: ModelConfig) -> int:
    """Floating-point operations of the matrix products that one segment of one row needs.

    A product of m x n and n x k matrices counts 2 m n k. Per layer: the projections to queries,
    keys and values and back, 4 x 2 T d HD; the feed-forward, 2 x 2 T d ffn_dim; local attention,
    scores and weighted sums, 2 x 2 HD for each pair of `count_window_pairs` with a full cache (what
    a mask hides is not needed). Then the logits, 2 T d vocab_size. Nothing is counted for memory,
    nor for softmax, norms and look-ups.
    """
    tokens, inner = config.segment_len, config.num_heads * config.head_dim
    num_cached = config.window if config.xl_cache else 0
    pairs = count_window_pairs(tokens, config.window, num_cached)
    projections = 4 * 2 * tokens * config.model_dim * inner
    feed_forward = 2 * 2 * tokens * config.model_dim * config.ffn_dim
    attention = 2 * 2 * pairs * inner
    logits = 2 * tokens * config.model_dim * config.vocab_size
    return config.num_layers * (projections + feed_forward + attention) + logits


def count_step_flops(config: ModelConfig) -> int:
    """Model FLOPs of forward and backward: three times the forward pass, as is usual.

    The backward pass of a product is two products of its size. Cached keys and values take no
    gradient, so that this is a little more than needed: 1% for the paper's 200M model.
    """
    return 3 * count_forward_flops(config)


def make_large_product(dim: int, dtype: torch.dtype) -> tuple[Callable[[], Tensor], int]:
    """A product of two dim x dim matrices into a buffer that is reused, and its FLOPs."""
    left, right = (torch.randn(dim, dim).to(dtype) for _ in range(2))
    buffer = torch.empty(dim, dim, dtype=dtype)
    return (lambda: torch.mm(left, right, out=buffer)), 2 * dim**3
