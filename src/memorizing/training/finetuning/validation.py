"""Evaluations during finetuning: held-out documents, with memory and without."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from memorizing.evaluation import EvaluationResult, Progress
from memorizing.evaluation.pretrained import evaluate_model
from memorizing.training.validation import HeldOut


@dataclass(frozen=True)
class Evaluation:
    """What one evaluation found."""

    result: EvaluationResult
    """With the memory that is trained."""
    without: EvaluationResult | None
    """Without memory; None where the first has none either."""


class FinetuneValidator(HeldOut):
    """Evaluates a model that is finetuned."""

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
        return Evaluation(result, without), self._judge(step, result)
