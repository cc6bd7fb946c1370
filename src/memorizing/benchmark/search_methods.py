"""Ways to search that are found to be right: every index, and what it is compared with."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from memorizing.benchmark.indexes import build_index
from memorizing.benchmark.verification import Truth, check_exact, check_index
from memorizing.errors import IndexUnavailableError
from memorizing.index_settings import BucketSettings, IndexSettings
from memorizing.knn import Neighbors, StoredKeys, is_emulated
from memorizing.knn.blocks import import_package
from memorizing.knn.buckets import expect_recall


def make_product(queries: Tensor, keys: Tensor) -> Callable[[], None]:
    """The scores alone, in the dtype of the keys, into one buffer (T, N) that all heads reuse.

    The limit of a search that scores every key. Where the processor emulates that dtype it is the
    product in fp32, of copies made beforehand.
    """
    queries, keys = _widen(queries), _widen(keys)
    buffer = keys.new_empty(queries.shape[1], keys.shape[1])

    def multiply() -> None:
        for head_queries, head_keys in zip(queries, keys, strict=True):
            torch.mm(head_queries, head_keys.T, out=buffer)

    return multiply


def make_topk(queries: Tensor, keys: Tensor, num_neighbors: int) -> Callable[[], Tensor]:
    """`torch.mm` as in `make_product`, then `torch.topk`: slots (H, T, k)."""
    queries, keys = _widen(queries), _widen(keys)
    buffer = keys.new_empty(queries.shape[1], keys.shape[1])

    def search() -> Tensor:
        slots = []
        for head_queries, head_keys in zip(queries, keys, strict=True):
            torch.mm(head_queries, head_keys.T, out=buffer)
            slots.append(torch.topk(buffer, num_neighbors, dim=-1).indices)
        return torch.stack(slots)

    return search


def make_faiss_knn(queries: Tensor, keys: Tensor, num_neighbors: int) -> Callable[[], Tensor]:
    """`faiss.knn` by inner product in fp32, converted beforehand: slots (H, T, k).

    Raises:
        IndexUnavailableError: Faiss is not installed.
    """
    faiss = import_package("faiss", "faiss")
    arrays = [
        (head_queries.float().numpy(), head_keys.float().numpy())
        for head_queries, head_keys in zip(queries, keys, strict=True)
    ]
    num_threads = torch.get_num_threads()

    def search() -> Tensor:
        before = faiss.omp_get_max_threads()
        faiss.omp_set_num_threads(num_threads)
        try:
            slots = [
                faiss.knn(ours, theirs, num_neighbors, metric=faiss.METRIC_INNER_PRODUCT)[1]
                for ours, theirs in arrays
            ]
        finally:
            faiss.omp_set_num_threads(before)
        return torch.stack([torch.from_numpy(part) for part in slots])

    return search


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


def _widen(x: Tensor) -> Tensor:
    """`x` in the dtype in which the processor multiplies it: itself, or fp32 of it."""
    return x.float() if is_emulated(x.dtype) else x
