"""Documents side by side, each with a cache and memories of its own, read one after another."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from memorizing.data import SegmentBatch
from memorizing.errors import CheckpointError
from memorizing.huggingface.attaching.attachment import Attachment
from memorizing.huggingface.sessions.cache_state import dump_cache, load_cache
from memorizing.loss import sum_nats


class FinetuneRows:
    """A cache per row. A document that begins gets a new one, so that rows end where they like.

    `read` computes a step's gradient, row after row; `commit` makes the step part of the histories.
    """

    def __init__(self, model: Any, attachment: Attachment, num_rows: int) -> None:
        """Start with empty histories; the attachment must be bound while rows are read."""
        self._model, self._attachment = model, attachment
        self._device = model.get_input_embeddings().weight.device
        self._caches: list[DynamicCache | None] = [None] * num_rows

    def read(self, batch: SegmentBatch) -> float:
        """Forward and backward over a segment of every row; gradients add to the parameters'.

        The loss is summed nats / target tokens of all rows. What the cache holds of segments before
        takes no gradient.

        Returns:
            Summed nats.
        """
        num_targets = max(batch.num_targets, 1)
        total = 0.0
        for row, length in enumerate(batch.valid.sum(1).tolist()):
            if batch.doc_start[row]:
                self._caches[row] = self._attachment.make_cache()
            if not length:
                continue
            cache = self._caches[row]
            assert cache is not None  # a row's first segment begins a document
            output = self._model(
                input_ids=batch.tokens[row : row + 1, :length].to(self._device),
                **self._attachment.pass_cache(cache),
            )
            targets = batch.targets[row : row + 1, :length].to(self._device)
            nats = sum_nats(output.logits, targets, torch.ones_like(targets, dtype=torch.bool))
            if nats.requires_grad:  # not so where only gates are trained and no memory is filled
                (nats / num_targets).backward()
            total += nats.item()
        return total

    def commit(self) -> None:
        """After the backward pass of all rows: let the segments that were read be retrieved."""
        for cache in self._caches:
            if cache is not None:
                self._attachment.commit(cache)

    def measure_fill(self) -> dict[int, float]:
        """Per memory layer, entries held / entries that all rows could hold."""
        fills: dict[int, list[float]] = {}
        for cache in self._caches:
            if cache is None:
                continue
            for layer, memory in self._attachment.find_history(cache).memories.items():
                fills.setdefault(layer, []).append(float(memory.size[0]) / memory.capacity)
        return {layer: sum(values) / len(values) for layer, values in fills.items()}

    def state_dict(self, doc_ends: Tensor) -> dict[str, Tensor]:
        """All histories as `row.<row>.<name>`, by reference.

        Args:
            doc_ends: (rows,) bool: the row's document is read to its end. Nothing of it is needed
                any more, and nothing of it is given.
        """
        tensors: dict[str, Tensor] = {}
        for row, cache in enumerate(self._caches):
            if cache is None or doc_ends[row]:
                continue
            dumped = dump_cache(self._attachment, cache) or {}
            tensors |= {f"row.{row}.{name}": tensor for name, tensor in dumped.items()}
        return tensors

    def load_state_dict(self, tensors: Mapping[str, Tensor], doc_ends: Tensor) -> None:
        """Put back what `state_dict` gave. In place.

        Raises:
            CheckpointError: the histories are of another model, memory or number of rows.
        """
        by_row: dict[int, dict[str, Tensor]] = {}
        for key, tensor in tensors.items():
            _, row, name = key.split(".", 2)
            by_row.setdefault(int(row), {})[name] = tensor
        needed = [row for row, is_ended in enumerate(doc_ends.tolist()) if not is_ended]
        if sorted(by_row) != needed:
            raise CheckpointError(
                f"the checkpoint holds the histories of rows {sorted(by_row)}, and rows {needed} "
                "go on; it was altered, or is of another number of rows"
            )
        self._caches = [
            load_cache(self._attachment, by_row[row]) if row in by_row else None
            for row in range(len(self._caches))
        ]
