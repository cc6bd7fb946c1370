"""How fast a long text is read into memory: forward without gradient, and commit."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from memorizing.benchmark.preparing import (
    DEFAULT_PRECISION,
    DTYPES,
    check_arguments,
    describe_benchmark,
    fill_state,
)
from memorizing.benchmark.timing import time_interleaved
from memorizing.benchmark.verification import check_state
from memorizing.config import ModelConfig
from memorizing.index_settings import parse_index
from memorizing.model import MemorizingTransformer


def benchmark_read(
    config: ModelConfig,
    entries: Sequence[int] = (8192, 65_536),
    num_pairs: int = 20,
    num_warmup: int = 3,
    precision: str = DEFAULT_PRECISION,
    *,
    index: str = "exact",
    on_progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Time reading segments with full memories, searched and closed, against none.

    A closed memory is written but not searched: what reading needs where one memory layer is all
    there is, since what is stored does not depend on what was retrieved. The model and the entries
    are random. Seeds torch's global generator.

    Args:
        config: the model; one row of `segment_len` tokens is read at a time.
        entries: capacities of 1 or more, each filled to the last slot.
        num_pairs: interleaved segments after `num_warmup` untimed ones.
        num_warmup: segments that are not counted.
        precision: `bf16` or `fp32`, of weights, activations and products.
        index: what searches the memories, as `parse_index` reads it.
        on_progress: called with repetitions done and in all.

    Returns:
        `rows`: `no_memory`, then `closed` and `searched` for each of `entries`, each with `name`,
        `entries`, `seconds` of a segment (median), `tokens_per_s`, `compared_with`, `ratio` (of
        seconds) and `added_s` (medians over pairs); `searched` also has `recall` (on random
        queries). Then the machine and the settings.

    Raises:
        ConfigError: a model without memory layers, a capacity that cannot be, another precision,
            or an index that is not known.
        IndexUnavailableError: the index needs a package that is not installed.
        MemorizingError: a search gives wrong results: no speed is reported then.
    """
    check_arguments(config, entries, num_pairs, precision)
    parse_index(index)
    torch.manual_seed(0)
    model = MemorizingTransformer(replace(config, capacity=max(entries))).to(DTYPES[precision])
    model.eval()
    model.compute_dtype = DTYPES[precision]
    tokens = torch.randint(config.vocab_size, (1, config.segment_len))
    sizes = list(dict.fromkeys(entries))
    states = {size: fill_state(model, tokens, size, index) for size in [0, *sizes]}
    recalls = {size: check_state(states[size], config) for size in sizes}

    def read_segment(size: int, is_open: bool) -> None:
        states[size] = model(tokens, states[size], memory_open=is_open).state.commit()

    arms = [("no_memory", 0)] + [(name, size) for size in sizes for name in ("closed", "searched")]
    with torch.no_grad():
        timings = time_interleaved(
            {
                f"{name} {size}": partial(read_segment, size, name != "closed")
                for name, size in arms
            },
            num_pairs,
            num_warmup,
            on_progress=on_progress,
        )
    rows = []
    for name, size in arms:
        row = timings.compare(f"{name} {size}", "no_memory 0")
        row |= {"name": name, "entries": size, "compared_with": "no_memory"}
        row["tokens_per_s"] = config.segment_len / row["seconds"]
        rows.append(row | ({"recall": recalls[size]} if name == "searched" else {}))
    return {
        **describe_benchmark("read", model, precision, index, num_pairs),
        "rows": rows,
    }
