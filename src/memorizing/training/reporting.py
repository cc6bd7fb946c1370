"""What training tells while it runs and when it ends: results, metrics, progress."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from memorizing.data import SegmentLoader
from memorizing.evaluation import EvaluationResult, Progress
from memorizing.model import MemorizingTransformer
from memorizing.training.counters import Counters, Window
from memorizing.training.metrics_log import MetricsLog
from memorizing.training.optimizer import Optimizer
from memorizing.training.progress import Display
from memorizing.training.rows import Rows
from memorizing.training.run_folder import METRICS_FILE, TENSORBOARD_FOLDER

_SHOW_INTERVAL_S = 0.25


@dataclass(frozen=True)
class StepMetrics:
    """What one step did."""

    step: int
    """Counted from 1."""
    nats: float
    """Summed over the target tokens."""
    num_targets: int
    grad_norm: float
    """Of all parameters together, before clipping."""
    step_s: float


@dataclass(frozen=True)
class TrainingResult:
    """How a call of training ended."""

    run_dir: Path | None
    steps: int
    """Steps taken since the run began."""
    tokens: int
    """Target tokens since the run began."""
    seconds: float
    """Time since the run began, in all its sessions, evaluations included."""
    interrupted: bool
    """Whether a signal ended it before its last step. Resume to go on."""
    train_nats: float
    """Nats per token over the last steps, at most 100."""
    validation_nats: float | None
    """Nats per token of the last evaluation; None without one."""


class MeasuresFill(Protocol):
    """The rows of a training."""

    def measure_fill(self) -> dict[int, float]:
        """Per memory layer, the share of its slots that hold something."""
        ...


class RunReporter(ABC):
    """Writes the metrics and moves the progress display. Reads the training, never changes it."""

    def __init__(
        self, display: Display, loader: SegmentLoader, optimizer: Optimizer, rows: MeasuresFill
    ) -> None:
        """Report on these."""
        self.display = display
        self._loader, self._optimizer, self._rows = loader, optimizer, rows
        self._log: MetricsLog | None = None
        self._shown_s = 0.0

    def _list_facts(self) -> dict[str, str]:
        """What else the progress display shows."""
        return {}

    @abstractmethod
    def _describe_gates(self) -> dict[str, Any]:
        """What is logged of gates."""

    def open(self, run_dir: Path | None, step: int, last_step: int) -> None:
        """Begin: metrics go to the run's folder where there is one, continued after `step`."""
        if run_dir is not None:
            run_dir.mkdir(parents=True, exist_ok=True)
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
        self.display.update(metrics.step, facts | self._list_facts())

    def make_evaluation_progress(self, step: int) -> Progress:
        """What an evaluation after a step calls to move the progress display."""

        def progress(done: int, total: int) -> None:
            if time.monotonic() - self._shown_s >= _SHOW_INTERVAL_S:
                self._shown_s = time.monotonic()
                self.display.update(step, {"evaluating": f"{done / total:.0%}"})

        return progress

    def log_training(self, counters: Counters, window: Window) -> None:
        """Write a line about the steps of a window."""
        values = {
            "nats_per_token": window.nats / max(window.num_targets, 1),
            "tokens": counters.tokens,
            "epoch": self._loader.epoch,
            "seconds": counters.seconds,
            "tokens_per_s": window.num_targets / window.seconds,
            "grad_norm": window.grad_norm / window.steps,
            "rate": self._optimizer.rates(),
            "memory_fill": {str(k): v for k, v in self._rows.measure_fill().items()},
        }
        self._write(counters.step, "train", values | self._describe_gates())

    def _report_validation(
        self, step: int, values: dict[str, Any], said: str, is_best: bool
    ) -> None:
        """Write a line about an evaluation, and say it."""
        self._write(step, "validation", {**values, "is_best": is_best})
        note = " (best so far)" if is_best else ""
        self.display.say(f"step {step}: validation {said}{note}")

    def _write(self, step: int, kind: str, values: dict[str, Any]) -> None:
        if self._log is not None:
            self._log.write(step, {kind: values})


class Reporter(RunReporter):
    """Reports on the training of our own model."""

    def __init__(
        self,
        display: Display,
        model: MemorizingTransformer,
        loader: SegmentLoader,
        optimizer: Optimizer,
        rows: Rows,
    ) -> None:
        """Report on these."""
        super().__init__(display, loader, optimizer, rows)
        self._model = model

    def log_validation(self, step: int, result: EvaluationResult, is_best: bool) -> None:
        """Write a line about an evaluation, and say it."""
        said = f"perplexity {result.perplexity:.3f}"
        self._report_validation(step, describe_result(result), said, is_best)

    def _list_facts(self) -> dict[str, str]:
        gates = self._read_gates().values()
        if not gates:
            return {}
        values = torch.cat(list(gates))
        return {"gates": f"{values.min().item():.2f}-{values.max().item():.2f}"}

    def _describe_gates(self) -> dict[str, Any]:
        return {"gate": {str(k): gate.tolist() for k, gate in self._read_gates().items()}}

    def _read_gates(self) -> dict[int, torch.Tensor]:
        """Gates of a model that reads a memory: without one they say nothing."""
        return self._model.gates() if self._model.config.has_memory else {}


def describe_result(result: EvaluationResult) -> dict[str, Any]:
    """What is logged of an evaluation."""
    return {
        "nats_per_token": result.nats / result.tokens,
        "perplexity": result.perplexity,
        "tokens": result.tokens,
        "capacity": result.capacity,
    }
