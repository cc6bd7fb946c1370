"""Documents that a model of `transformers` is trained on: read in segments, with memory."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, final

import torch
from torch import Tensor
from transformers import DynamicCache

from memorizing.data import RowLoader, SegmentBatch, SegmentLoader
from memorizing.errors import CheckpointError
from memorizing.evaluation import EvaluationResult, Progress
from memorizing.evaluation.pretrained import evaluate_model
from memorizing.huggingface.attaching.attachment import Attachment
from memorizing.huggingface.sessions.cache_state import dump_cache, load_cache
from memorizing.huggingface.sessions.scoring import read_memory
from memorizing.loss import sum_nats
from memorizing.ranks import Ranks
from memorizing.training.loop import Histories
from memorizing.training.reporting import Evaluation, HeldOut


class FinetuneRows(Histories):
    """What the rows of this process read, step by step.

    `read` computes a step's gradient, row after row; `commit` makes the step part of the histories.

    Attributes:
        loader: gives the batches.
    """

    loader: RowLoader

    @abstractmethod
    def open(self) -> AbstractContextManager[None]:
        """Within this context rows are read.

        Raises:
            CheckpointError: what was loaded is of another model, memory or number of rows.
        """

    @abstractmethod
    def read(self, batch: SegmentBatch, num_targets: int) -> float:
        """Forward and backward over the next batch of own rows; gradients add to the parameters'.

        The loss is summed nats / target tokens of all rows.

        Args:
            batch: the next of every own row.
            num_targets: of all rows, those of other processes too.

        Returns:
            Summed nats.
        """

    @abstractmethod
    def evaluate(self, held_out: HeldOut, progress: Progress, ranks: Ranks) -> Evaluation:
        """Read what is held out, in several processes together."""


@final
class SegmentRows(FinetuneRows):
    """A cache per row. A document that begins gets a new one, so that rows end where they like.

    Caches last as long as a memory is open; between two times they are kept as tensors.
    """

    def __init__(
        self, model: Any, attachment: Attachment, loader: SegmentLoader, mine: range
    ) -> None:
        """Start with empty histories of what a loader is about to give in the rows of `mine`."""
        self._model, self._attachment, self.loader = model, attachment, loader
        self._mine = mine
        self._caches: list[DynamicCache | None] = [None] * len(mine)
        self._kept: dict[str, Tensor] | None = {}
        """Histories while they are not in caches that can be read on: of the last commit."""

    @contextmanager
    def open(self) -> Iterator[None]:
        """See `FinetuneRows`."""
        with read_memory(self._attachment):
            self._make_caches()
            yield
            self._kept = self.state_dict()

    def _make_caches(self) -> None:
        by_row: dict[int, dict[str, Tensor]] = {}
        for key, tensor in (self._kept or {}).items():
            _, row, name = key.split(".", 2)
            by_row.setdefault(int(row), {})[name] = tensor
        is_ended = self._find_doc_ends()
        needed = [row for row in self._mine if not is_ended[row]]
        if sorted(by_row) != needed:
            raise CheckpointError(
                f"the checkpoint holds the histories of rows {sorted(by_row)}, and rows {needed} "
                "go on; it was altered, or is of another number of rows"
            )
        self._caches = [
            load_cache(self._attachment, by_row[row]) if row in by_row else None
            for row in self._mine
        ]
        self._kept = None

    def read(self, batch: SegmentBatch, num_targets: int) -> float:
        """See `FinetuneRows`; what the cache holds of segments before takes no gradient."""
        # Reading changes the caches in place: what a step that fails goes back to is kept.
        self._kept = self._dump(batch.doc_start.tolist())
        device = self._model.get_input_embeddings().weight.device
        num_targets = max(num_targets, 1)
        total = 0.0
        for row, length in enumerate(batch.valid.sum(1).tolist()):
            if batch.doc_start[row]:
                self._caches[row] = self._attachment.make_cache()
            if not length:
                continue
            cache = self._caches[row]
            assert cache is not None  # a row's first segment begins a document
            output = self._model(
                input_ids=batch.tokens[row : row + 1, :length].to(device),
                **self._attachment.pass_cache(cache),
            )
            targets = batch.targets[row : row + 1, :length].to(device)
            nats = sum_nats(output.logits, targets, torch.ones_like(targets, dtype=torch.bool))
            if nats.requires_grad:  # not so where only gates are trained and no memory is filled
                (nats / num_targets).backward()
            total += nats.item()
        return total

    def evaluate(self, held_out: HeldOut, progress: Progress, ranks: Ranks) -> Evaluation:
        """See `FinetuneRows`: with memory, and without."""
        capacity = self._attachment.settings.capacity
        num_runs = 2 if capacity else 1

        def read(number: int, capacity: int) -> EvaluationResult:
            return evaluate_model(
                self._model,
                held_out.documents,
                capacity=capacity,
                max_tokens=held_out.max_tokens,
                start_token=held_out.start_token,
                progress=lambda done, total: progress(number * total + done, num_runs * total),
                ranks=ranks,
            )

        return Evaluation(read(0, capacity), read(1, 0) if capacity else None)

    def commit(self) -> None:
        """See `Histories`."""
        for cache in self._caches:
            if cache is not None:
                self._attachment.commit(cache)
        self._kept = None

    def measure_fill(self) -> dict[int, float]:
        """See `Histories`."""
        fills: dict[int, list[float]] = {}
        for cache in self._caches:
            if cache is None:
                continue
            for layer, memory in self._attachment.find_history(cache).memories.items():
                fills.setdefault(layer, []).append(float(memory.size[0]) / memory.capacity)
        return {layer: sum(values) / len(values) for layer, values in fills.items()}

    def state_dict(self) -> dict[str, Tensor]:
        """See `Histories`; a row whose document is read to its end has none."""
        if self._kept is not None:
            return self._kept
        return self._dump(self._find_doc_ends()[self._mine.start : self._mine.stop])

    def load_state_dict(self, tensors: Mapping[str, Tensor]) -> None:
        """See `Histories`; what cannot be used is refused by `open`."""
        others = {str(row) for row in range(self.loader.num_rows) if row not in self._mine}
        self._kept = {n: t for n, t in tensors.items() if n.split(".", 2)[1] not in others}

    def _find_doc_ends(self) -> list[bool]:
        """Per row of all, whether its next segment begins a document."""
        rows = self.loader.state_dict()["rows"]
        lengths = [len(document.tokens) for document in self.loader.documents]
        return [index < 0 or place >= lengths[index] for index, place in rows]

    def _dump(self, doc_ends: Sequence[bool]) -> dict[str, Tensor]:
        tensors: dict[str, Tensor] = {}
        for row, cache, is_ended in zip(self._mine, self._caches, doc_ends, strict=True):
            if cache is not None and not is_ended:
                dumped = dump_cache(self._attachment, cache) or {}
                tensors |= {f"row.{row}.{name}": tensor for name, tensor in dumped.items()}
        return tensors
