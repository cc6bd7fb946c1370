"""Evaluations during finetuning: held-out documents, with memory and without."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from memorizing.data import TokenizedDocument
from memorizing.evaluation import EvaluationResult, Progress
from memorizing.evaluation.pretrained import evaluate_model

_MIN_SEGMENTS = 4
"""Documents are read at least this far, so that there is something in memory to find."""


@dataclass(frozen=True)
class Evaluation:
    """What one evaluation found."""

    result: EvaluationResult
    """With the memory that is trained."""
    without: EvaluationResult | None
    """Without memory; None where the first has none either."""


class FinetuneValidator:
    """Evaluates the same tokens each time; remembers the best result."""

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

    def evaluate(
        self, model: Any, step: int, capacity: int, progress: Progress
    ) -> tuple[Evaluation, bool]:
        """Evaluate after a step; the second value tells whether it is the best so far."""
        num_runs = 2 if capacity else 1

        def read(number: int, capacity: int) -> EvaluationResult:
            return evaluate_model(
                model,
                self._documents,
                capacity=capacity,
                max_tokens=self._max_tokens,
                start_token=self._start_token,
                progress=lambda done, total: progress(number * total + done, num_runs * total),
            )

        result = read(0, capacity)
        without = read(1, 0) if capacity else None
        self.last_nats = result.nats / result.tokens
        is_best = self.best_nats is None or self.last_nats < self.best_nats
        if is_best:
            self.best_step, self.best_nats = step, self.last_nats
        return Evaluation(result, without), is_best

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
