"""Ways to search that are found to be right: every index, and what it is compared with."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from memorizing.benchmark.building import build_index
from memorizing.benchmark.search_bases import make_faiss_knn, make_topk
from memorizing.benchmark.verification import Truth, check_exact, check_index
from memorizing.errors import IndexUnavailableError
from memorizing.index_settings import BucketSettings, IndexSettings
from memorizing.knn import Neighbors, StoredKeys
from memorizing.knn.buckets import expect_recall


@dataclass(frozen=True)
class Method:
    """A way to search, that was found to be right."""

    name: str
    search: Callable[[], object]
    recall: float | None = None
    settings: dict[str, Any] = dataclasses.field(default_factory=dict)
    build_s: float | None = None
    expected_recall: float | None = None
    """By the formula of approximate top k, where the index has one."""


def prepare_index(settings: IndexSettings, truth: Truth, other_queries: Tensor) -> Method:
    """An index over the whole memory, sealed and checked.

    Args:
        settings: which index.
        truth: queries, keys and what is right.
        other_queries: (H, T', D), not those that are searched for: for an index that is trained
            on queries too.

    Raises:
        ConfigError: the index is trained on queries, and there are no others.
        IndexUnavailableError: the index needs a package that is not installed.
        MemorizingError: its results are wrong.
    """
    name = str(settings)
    stored = StoredKeys(truth.keys.unsqueeze(0), (truth.keys.shape[1],))
    built = build_index(settings, stored, other_queries)
    queries = truth.queries.unsqueeze(0)

    def search() -> Neighbors:
        return built.index.search(queries, stored, truth.num_neighbors)

    found = search()
    check_index(settings, found, truth)
    recall = truth.measure_recall(found.slots[0], found.valid[0])
    described = {"index": settings.name, **dataclasses.asdict(settings)}
    expected = None
    if isinstance(settings, BucketSettings):
        expected = expect_recall(
            truth.keys.shape[1], truth.num_neighbors, settings.num_buckets, settings.per_bucket
        )
    return Method(name, search, recall, described, built.seconds, expected)


def make_bases(truth: Truth, unavailable: dict[str, str]) -> list[Method]:
    """The searches that others would write, checked.

    Args:
        truth: queries, keys and what is right.
        unavailable: gets the name and the reason of what is not installed. Changed in place.

    Raises:
        MemorizingError: the results of one are wrong.
    """
    bases = []
    for name, make, dtype in (
        ("topk", make_topk, truth.keys.dtype),
        ("faiss_knn", make_faiss_knn, torch.float32),
    ):
        try:
            search = make(truth.queries, truth.keys, truth.num_neighbors)
        except IndexUnavailableError as error:
            unavailable[name] = str(error)
            continue
        slots = search()
        check_exact(name, slots, truth, dtype)
        bases.append(Method(name, search, truth.measure_recall(slots)))
    return bases
