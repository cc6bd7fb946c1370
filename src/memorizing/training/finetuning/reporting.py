"""What finetuning tells while it runs: metrics and progress."""

from __future__ import annotations

from typing import Any

from memorizing.data import SegmentLoader
from memorizing.huggingface.attaching.attachment import Attachment
from memorizing.training.finetuning.rows import FinetuneRows
from memorizing.training.finetuning.validation import Evaluation
from memorizing.training.optimizer import Optimizer
from memorizing.training.progress import Display
from memorizing.training.reporting import RunReporter, describe_result


class FinetuneReporter(RunReporter):
    """Reports on the finetuning of a model of `transformers`."""

    def __init__(
        self,
        display: Display,
        attachment: Attachment,
        loader: SegmentLoader,
        optimizer: Optimizer,
        rows: FinetuneRows,
    ) -> None:
        """Report on these."""
        super().__init__(display, loader, optimizer, rows)
        self._attachment = attachment

    def log_validation(self, step: int, evaluation: Evaluation, is_best: bool) -> None:
        """Write a line about an evaluation, and say it."""
        result, without = evaluation.result, evaluation.without
        values = describe_result(result)
        said = f"perplexity {result.perplexity:.3f}"
        if without is not None:
            values["off"] = describe_result(without)
            said += f" with memory, {without.perplexity:.3f} without"
        self._report_validation(step, values, said, is_best)

    def _describe_gates(self) -> dict[str, Any]:
        has_memory = self._attachment.settings.capacity > 0
        return {"heads": self._attachment.dump_heads() if has_memory else {}}
