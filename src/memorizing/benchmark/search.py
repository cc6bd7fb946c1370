"""Every index against the bare product of the same shapes, with its recall, checked before timed.

One search is that of a training step: all heads and queries of one row. Shapes: H heads,
T queries, N entries, D head_dim, k neighbors.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from memorizing.benchmark.preparing import describe_machine
from memorizing.benchmark.recording import Recording
from memorizing.benchmark.search_methods import Method, make_bases, make_product, prepare_index
from memorizing.benchmark.timing import Timings, time_interleaved
from memorizing.benchmark.verification import Truth, compute_truth
from memorizing.errors import ConfigError
from memorizing.index_settings import ExactSettings, IndexSettings, parse_index
from memorizing.knn import make_index
from memorizing.model.block import normalize

NUM_SLOW_PAIRS = 5
"""Pairs of a search that takes over 20 times as long as the product, unless fewer are asked for."""


@dataclass(frozen=True)
class SearchShape:
    """What is searched: H heads of T queries of D dimensions, for k neighbors each."""

    num_heads: int = 8
    num_queries: int = 512
    head_dim: int = 128
    num_neighbors: int = 32

    def __post_init__(self) -> None:
        """Refuse counts below 1."""
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if value < 1:
                raise ConfigError(f"{field.name} is {value}; allowed: 1 or more")


def benchmark_search(
    entries: Sequence[int] = (8192, 65_536),
    indexes: Sequence[str | IndexSettings] = ("exact",),
    *,
    shape: SearchShape | None = None,
    recording: Recording | None = None,
    use_random: bool = True,
    num_pairs: int = 20,
    num_warmup: int = 3,
    on_progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Time the search of full memories by every index, on random and on recorded keys.

    Keys are bf16 and so are the queries, which the search would round anyway. Random ones have
    the norm of 1 that the models' have. Of a recording, the newest keys and the first queries after
    them are searched; indexes that are trained on queries get the others. Every index is built and
    sealed beforehand, on the whole memory.

    Compared are, in turns and pair by pair, on the CPU:

    - every index with `product`: the scores alone, into a reused buffer;
    - exact search also with `topk` (`torch.mm` into a reused buffer, then `torch.topk`) and with
      `faiss_knn` (`faiss.knn`, fp32), which are themselves compared with `product`.

    Draws from torch's global generator after seeding it.

    Args:
        entries: sizes of the memory, each at least the number of neighbors.
        indexes: as `parse_index` reads them.
        shape: of the search; None is the paper's, with the heads of the recording where there is
            one.
        recording: real keys and queries.
        use_random: whether random ones are searched too.
        num_pairs: interleaved repetitions. A search more than 20 times as slow as the product has
            at most `NUM_SLOW_PAIRS`; every row says how many it has.
        num_warmup: repetitions before, which are not counted.
        on_progress: called with repetitions done and in all.

    Returns:
        `rows`, each with `name`, `data` (`random` or `recorded`), `entries`, `seconds` (median),
        `compared_with`, `ratio` (median of the pairwise ratios of seconds), `num_pairs`, `recall`
        (of the k nearest by fp32 products of the stored keys; None for `product`),
        `expected_recall` (by the formula, for `buckets`; else None),
        `queries_per_second`, `settings` and `build_s`; `unavailable`: what was left out, and why;
        and the machine and shapes.

    Raises:
        ConfigError: an unknown index or option, fewer entries than neighbors, or sizes that the
            recording does not have.
        IndexUnavailableError: an index that was asked for needs a package that is not installed.
        MemorizingError: a search gives wrong results on this machine: no speed is reported then.
    """
    settings = [parse_index(index) if isinstance(index, str) else index for index in indexes]
    shape = shape or choose_shape(recording)
    _check_arguments(entries, settings, shape, recording, use_random, num_pairs)
    for wanted in settings:
        make_index(wanted)  # says what is not installed before minutes of work
    torch.manual_seed(0)
    exact = [wanted for wanted in settings if isinstance(wanted, ExactSettings)]
    others = [wanted for wanted in settings if not isinstance(wanted, ExactSettings)]
    names = ["random"] * use_random + ["recorded"] * (recording is not None)
    turns = num_warmup + num_pairs
    total = len(names) * len(entries) * (1 + len(others)) * turns
    rows: list[dict[str, Any]] = []
    unavailable: dict[str, str] = {}
    done = 0

    def time_group(methods: Sequence[Method]) -> Timings:
        nonlocal done
        timings = time_interleaved(
            {method.name: method.search for method in methods},
            num_pairs,
            num_warmup,
            num_slow_pairs=min(num_pairs, NUM_SLOW_PAIRS),
            on_progress=lambda turn, _: on_progress and on_progress(done + turn, total),
        )
        done += turns
        return timings

    for name in names:
        for size in entries:
            source = recording if name == "recorded" else None
            keys, queries, other_queries = _draw(shape, size, source)
            truth = compute_truth(queries, keys, shape.num_neighbors)
            product = Method("product", make_product(queries, keys))
            bases = make_bases(truth, unavailable)
            methods = [
                product,
                *(prepare_index(wanted, truth, other_queries) for wanted in exact),
                *bases,
            ]
            timings = time_group(methods)
            for method in methods:
                compared_with = [product.name]
                if method.settings.get("index") == ExactSettings.name:
                    compared_with += [base.name for base in bases]
                rows += [_describe(method, base, name, truth, timings) for base in compared_with]
            for wanted in others:
                # One at a time: together they would not fit into the memory of a small machine.
                method = prepare_index(wanted, truth, other_queries)
                timings = time_group([product, method])
                rows.append(_describe(method, product.name, name, truth, timings))
    return {
        "benchmark": "search",
        "num_pairs": num_pairs,
        "num_warmup": num_warmup,
        "shape": dataclasses.asdict(shape),
        "dtype": "bfloat16",
        "recording": None if recording is None else recording.source,
        "unavailable": unavailable,
        **describe_machine(),
        "rows": rows,
    }


def choose_shape(recording: Recording | None, **counts: int | None) -> SearchShape:
    """The paper's shape, with the heads of a recording, and other counts where they are given.

    Args:
        recording: real keys and queries, whose heads and dimensions are taken.
        counts: fields of `SearchShape`; None leaves one out.

    Raises:
        ConfigError: a count below 1.
    """
    shape = SearchShape()
    if recording is not None:
        num_heads, num_queries, head_dim = recording.queries.shape
        shape = SearchShape(num_heads, min(num_queries, shape.num_queries), head_dim)
    given = {name: count for name, count in counts.items() if count is not None}
    return dataclasses.replace(shape, **given)


def _check_arguments(
    entries: Sequence[int],
    indexes: Sequence[IndexSettings],
    shape: SearchShape,
    recording: Recording | None,
    use_random: bool,
    num_pairs: int,
) -> None:
    if not entries or min(entries) < shape.num_neighbors:
        raise ConfigError(
            f"entries are {list(entries)}; allowed: one number or more, each at least the "
            f"{shape.num_neighbors} neighbors"
        )
    if not indexes or len(set(indexes)) < len(indexes):
        given = ", ".join(map(str, indexes)) or "none"
        raise ConfigError(f"the indexes are {given}; give at least one, and each once")
    if num_pairs < 1:
        raise ConfigError(f"num_pairs is {num_pairs}; allowed: 1 or more")
    if recording is None:
        if not use_random:
            raise ConfigError("there is nothing to search: give a recording, or use random keys")
        return
    num_heads, num_entries, head_dim = recording.keys.shape
    num_queries = recording.queries.shape[1]
    if (num_heads, head_dim) != (shape.num_heads, shape.head_dim):
        raise ConfigError(
            f"the recording has {num_heads} heads of {head_dim} dimensions and the search "
            f"{shape.num_heads} of {shape.head_dim}; leave the shape out to take the recording's"
        )
    if max(entries) > num_entries or shape.num_queries > num_queries:
        raise ConfigError(
            f"the recording has {num_entries:,} entries and {num_queries:,} queries per head, and "
            f"{max(entries):,} and {shape.num_queries:,} are to be searched; record more, or "
            "search fewer"
        )


def _draw(
    shape: SearchShape, size: int, recording: Recording | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Keys (H, N, D), queries (H, T, D), and other queries to train indexes on, bf16."""
    if recording is not None:
        keys = recording.keys[:, -size:]
        queries, others = recording.queries.tensor_split([shape.num_queries], 1)
    else:
        keys, queries, others = (
            _draw_unit_vectors(shape.num_heads, length, shape.head_dim)
            for length in (size, shape.num_queries, shape.num_queries)
        )
    return (
        keys.bfloat16().contiguous(),
        queries.bfloat16().contiguous(),
        others.bfloat16().contiguous(),
    )


def _draw_unit_vectors(num_heads: int, length: int, head_dim: int) -> Tensor:
    vectors = torch.empty(num_heads, length, head_dim, dtype=torch.bfloat16)
    for part in vectors:
        part.copy_(normalize(torch.randn(length, head_dim)))
    return vectors


def _describe(
    method: Method, base: str, data: str, truth: Truth, timings: Timings
) -> dict[str, Any]:
    row = timings.compare(method.name, base)
    num_heads, num_queries, _ = truth.queries.shape
    return {
        "name": row["name"],
        "data": data,
        "entries": truth.keys.shape[1],
        "seconds": row["seconds"],
        "compared_with": base,
        "ratio": row["ratio"],
        "num_pairs": row["num_pairs"],
        "recall": method.recall,
        "expected_recall": method.expected_recall,
        "queries_per_second": num_heads * num_queries / row["seconds"],
        "settings": method.settings,
        "build_s": method.build_s,
    }
