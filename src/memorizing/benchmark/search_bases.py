"""What a search is compared with: the product alone, and the searches that others would write.

All work head by head on queries (H, T, D) and keys (H, N, D), with as many threads as torch has.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from memorizing.knn import is_emulated
from memorizing.knn.blocks import import_package


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


def _widen(x: Tensor) -> Tensor:
    """`x` in the dtype in which the processor multiplies it: itself, or fp32 of it."""
    return x.float() if is_emulated(x.dtype) else x
