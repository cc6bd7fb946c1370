"""Evaluations during training, and which of them was the best."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from memorizing.config import TrainingConfig
from memorizing.data import TokenizedDocument
from memorizing.evaluation import EvaluationResult, Progress, evaluate_documents
from memorizing.model import MemorizingTransformer

_MIN_SEGMENTS = 4
"""Documents are read at least this far, so that there is something in memory to find."""


class HeldOut:
    """The same tokens each time, and which result on them was the best."""

    def __init__(
        self,
        documents: Sequence[TokenizedDocument],
        start_token: int,
        num_tokens: int,
        segment_len: int,
    ) -> None:
        """Choose about `num_tokens` tokens from the beginnings of documents."""
        self._start_token = start_token
        self._max_tokens = max(num_tokens // max(len(documents), 1), _MIN_SEGMENTS * segment_len)
        self._documents: list[TokenizedDocument] = []
        left = num_tokens
        for document in documents:
            if left > 0:
                self._documents.append(document)
                left -= min(len(document.tokens), self._max_tokens)
        self.best_step: int | None = None
        self.best_nats: float | None = None
        """Nats per token of the best evaluation."""
        self.last_nats: float | None = None

    def __bool__(self) -> bool:
        """Whether there is something to evaluate on."""
        return bool(self._documents)

    def _judge(self, step: int, result: EvaluationResult) -> bool:
        """Remember a result; whether it is the best so far."""
        self.last_nats = result.nats / result.tokens
        is_best = self.best_nats is None or self.last_nats < self.best_nats
        if is_best:
            self.best_step, self.best_nats = step, self.last_nats
        return is_best

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "best_step": self.best_step,
            "best_nats": self.best_nats,
            "last_nats": self.last_nats,
        }

    def load_dict(self, values: dict[str, Any]) -> None:
        """Put back what `to_dict` gave."""
        self.best_step, self.best_nats, self.last_nats = (
            values["best_step"],
            values["best_nats"],
            values["last_nats"],
        )


class Validator(HeldOut):
    """Evaluates a model in training, with a state of its own."""

    def __init__(
        self,
        documents: Sequence[TokenizedDocument],
        start_token: int,
        config: TrainingConfig,
        segment_len: int,
    ) -> None:
        """Choose about `config.evaluate_tokens` tokens from the beginnings of documents."""
        super().__init__(documents, start_token, config.evaluate_tokens, segment_len)
        self._rows = config.rows

    def evaluate(
        self, model: MemorizingTransformer, step: int, capacity: int, progress: Progress
    ) -> tuple[EvaluationResult, bool]:
        """Evaluate after a step, with a memory of `capacity` entries.

        Returns:
            The result, and whether it is the best so far.
        """
        result = evaluate_documents(
            model,
            self._documents,
            self._start_token,
            capacity=capacity,
            rows=self._rows,
            max_tokens=self._max_tokens,
            progress=progress,
        )
        return result, self._judge(step, result)
