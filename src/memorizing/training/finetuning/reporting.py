"""What finetuning tells while it runs: metrics and progress."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from memorizing.data import SegmentLoader
from memorizing.evaluation import EvaluationResult, Progress
from memorizing.huggingface.attachment import Attachment
from memorizing.training.counters import Counters, Window
from memorizing.training.finetuning.rows import FinetuneRows
from memorizing.training.finetuning.validation import Evaluation
from memorizing.training.metrics_log import MetricsLog
from memorizing.training.optimizer import Optimizer
from memorizing.training.progress import Display
from memorizing.training.reporting import StepMetrics
from memorizing.training.run_folder import METRICS_FILE, TENSORBOARD_FOLDER

_SHOW_INTERVAL_S = 0.25


class FinetuneReporter:
    """Writes the metrics and moves the progress display. Reads the training, never changes it."""

    def __init__(
        self,
        display: Display,
        attachment: Attachment,
        loader: SegmentLoader,
        optimizer: Optimizer,
        rows: FinetuneRows,
    ) -> None:
        """Report on these."""
        self.display = display
        self._attachment, self._loader = attachment, loader
        self._optimizer, self._rows = optimizer, rows
        self._log: MetricsLog | None = None
        self._shown_s = 0.0

    def open(self, run_dir: Path | None, step: int, last_step: int) -> None:
        """Begin: metrics go to the run's folder where there is one, continued after `step`."""
        if run_dir is not None:
            self._log = MetricsLog(run_dir / METRICS_FILE, run_dir / TENSORBOARD_FOLDER, step)
            if self._log.message:
                self.display.say(self._log.message)
        self._shown_s = 0.0
        self.display.start(step, last_step)

    def close(self) -> None:
        """End."""
        self.display.stop()
        if self._log is not None:
            self._log.close()
            self._log = None

    def show(self, metrics: StepMetrics, counters: Counters, is_last: bool) -> None:
        """Move the progress display, a few times a second at most."""
        if not is_last and time.monotonic() - self._shown_s < _SHOW_INTERVAL_S:
            return
        self._shown_s = time.monotonic()
        facts = {
            "loss": f"{counters.recent_nats:.3f}",
            "tokens/s": f"{metrics.num_targets / metrics.step_s:,.0f}",
        }
        if fills := self._rows.measure_fill().values():
            facts["memory"] = f"{sum(fills) / len(fills):.0%}"
        self.display.update(metrics.step, facts)

    def make_evaluation_progress(self, step: int) -> Progress:
        """What an evaluation after a step calls to move the progress display."""

        def progress(done: int, total: int) -> None:
            if time.monotonic() - self._shown_s >= _SHOW_INTERVAL_S:
                self._shown_s = time.monotonic()
                self.display.update(step, {"evaluating": f"{done / total:.0%}"})

        return progress

    def log_training(self, counters: Counters, window: Window) -> None:
        """Write a line about the steps of a window."""
        has_memory = self._attachment.settings.capacity > 0
        self._write(
            counters.step,
            "train",
            {
                "nats_per_token": window.nats / max(window.num_targets, 1),
                "tokens": counters.tokens,
                "epoch": self._loader.epoch,
                "seconds": counters.seconds,
                "tokens_per_s": window.num_targets / window.seconds,
                "grad_norm": window.grad_norm / window.steps,
                "rate": self._optimizer.rates(),
                "memory_fill": {str(k): v for k, v in self._rows.measure_fill().items()},
                "heads": self._attachment.dump_heads() if has_memory else {},
            },
        )

    def log_validation(self, step: int, evaluation: Evaluation, is_best: bool) -> None:
        """Write a line about an evaluation, and say it."""
        result, without = evaluation.result, evaluation.without
        values = {**_describe(result), "is_best": is_best}
        said = f"perplexity {result.perplexity:.3f}"
        if without is not None:
            values["off"] = _describe(without)
            said += f" with memory, {without.perplexity:.3f} without"
        self._write(step, "validation", values)
        note = " (best so far)" if is_best else ""
        self.display.say(f"step {step}: validation {said}{note}")

    def _write(self, step: int, kind: str, values: dict[str, Any]) -> None:
        if self._log is not None:
            self._log.write(step, {kind: values})


def _describe(result: EvaluationResult) -> dict[str, Any]:
    return {
        "nats_per_token": result.nats / result.tokens,
        "perplexity": result.perplexity,
        "tokens": result.tokens,
        "capacity": result.capacity,
    }
