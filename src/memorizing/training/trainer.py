"""The training loop."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from memorizing.config import TrainingConfig
from memorizing.data import SegmentBatch, SegmentLoader, TokenizedDocument, Tokenizer
from memorizing.errors import CheckpointError, NonFiniteLossError, NonFiniteQueryError
from memorizing.model import MemorizingTransformer
from memorizing.training.checkpoint import (
    TrainingState,
    load_training_state,
    load_weights,
    save_model,
)
from memorizing.training.checkpoints import locate_checkpoint, prune_checkpoints
from memorizing.training.counters import Counters, Window, capture_generators, restore_generators
from memorizing.training.interruption import StopRequest, catch_stop_signals
from memorizing.training.optimizer import Optimizer, clip_gradients, group_parameters
from memorizing.training.precision import Precision, choose_precision
from memorizing.training.progress import Display, SilentDisplay
from memorizing.training.reporting import Reporter, StepMetrics, TrainingResult
from memorizing.training.rows import Rows
from memorizing.training.validation import Validator


class Trainer:
    """Trains a model: forward, loss, backward, clip, update, commit, for one segment of every row.

    `train` builds one from a configuration; experiments make their own. Without `run_dir` nothing
    is written to disk.
    """

    def __init__(
        self,
        model: MemorizingTransformer,
        loader: SegmentLoader,
        config: TrainingConfig,
        *,
        run_dir: Path | None = None,
        tokenizer: Tokenizer | None = None,
        validation: Sequence[TokenizedDocument] = (),
        precision: Precision | None = None,
        display: Display | None = None,
        on_step: Callable[[StepMetrics], None] | None = None,
    ) -> None:
        """Prepare to train from the beginning; `load` goes on from a checkpoint.

        Args:
            model: trained in place, on the device it is on. Its compute dtype is set.
            loader: gives batches of `config.rows` rows; training ends early where it does.
            config: how to train.
            run_dir: folder for checkpoints, metrics and TensorBoard.
            tokenizer: saved with every checkpoint.
            validation: documents of the evaluations during training.
            precision: of products and activations; None follows `config.precision`.
            display: what a person sees; None is nothing.
            on_step: called after every step.
        """
        shape = model.config
        self.model, self.loader, self.config = model, loader, config
        self._run_dir, self._tokenizer, self._on_step = run_dir, tokenizer, on_step
        self._device = model.embedding.weight.device
        self.precision = precision or choose_precision(
            config.precision, shape.model_dim, shape.ffn_dim, self._device
        )
        model.compute_dtype = self.precision.dtype
        model.gradient_checkpointing = config.gradient_checkpointing
        groups = group_parameters(model, [model.embedding.weight], model.memory_parameters())
        self.optimizer = Optimizer(groups, config)
        self._rows = Rows(model, config.rows, config.accumulation)
        self._validator = Validator(validation, loader.start_token, config, shape.segment_len)
        self._reporter = Reporter(
            display or SilentDisplay(), model, loader, self.optimizer, self._rows
        )
        self._closing = torch.Generator().manual_seed(config.seed)
        self._counters = Counters()
        self._saved_step = -1

    @property
    def step(self) -> int:
        """Steps taken."""
        return self._counters.step

    def run(self, until: int | None = None) -> TrainingResult:
        """Train up to a step (by default the last), the documents' end, or SIGINT or SIGTERM.

        A signal lets the present step finish; then, as at every end, a checkpoint is saved. A
        second signal acts as it usually does.

        Raises:
            NonFiniteLossError: the loss or a gradient is NaN or infinite. The weights are those
                before the step, and saved.
            ResourceError: no space left; earlier checkpoints are unharmed.
        """
        last = self.config.steps if until is None else min(until, self.config.steps)
        self.model.train()
        with catch_stop_signals() as stop:
            try:
                self._reporter.open(self._run_dir, self.step, last)
                self._run_steps(last, stop)
                self.save()
            finally:
                self._reporter.close()
        interrupted = bool(stop) and self.step < last
        if interrupted:
            self._reporter.display.say(
                f"{stop.signal_name}: stopped after step {self.step}; resume to go on"
            )
        return TrainingResult(
            self._run_dir,
            self.step,
            self._counters.tokens,
            self._counters.seconds,
            interrupted,
            self._counters.recent_nats,
            self._validator.last_nats,
        )

    def _run_steps(self, last: int, stop: StopRequest) -> None:
        counters, config = self._counters, self.config
        before_s = counters.seconds - time.monotonic()
        while self.step < last and not stop:
            metrics = self._take_step()
            if metrics is None:
                self._reporter.display.say(f"the documents ended after step {self.step}")
                return
            counters.seconds = before_s + time.monotonic()
            if self._on_step is not None:
                self._on_step(metrics)
            self._reporter.show(metrics, counters, is_last=self.step == last)
            if self._is_due(config.log_every, at_end=True):
                window, counters.window = counters.window, Window()
                self._reporter.log_training(counters, window)
            is_best = self._is_due(config.evaluate_every, at_end=True) and self._evaluate()
            counters.seconds = before_s + time.monotonic()
            if is_best or self._is_due(config.checkpoint_every):
                self.save()

    def _is_due(self, every: int, at_end: bool = False) -> bool:
        return every > 0 and (self.step % every == 0 or (at_end and self.step == self.config.steps))

    def _take_step(self) -> StepMetrics | None:
        """One step, or None where the loader has ended."""
        start_s = time.perf_counter()
        before = self._capture_position()
        try:
            batches = self._next_segments()
        except StopIteration:
            return None
        num_targets = sum(batch.num_targets for batch in batches)
        self.optimizer.zero_grad()
        try:
            nats = self._rows.read(
                self.model, batches, self._draw_open_rows(), self.config.crossbatch_rows
            )
            norm = clip_gradients(self.optimizer.parameters(), self.config.clip_norm)
        except NonFiniteQueryError:
            # What the search refuses would have made the loss NaN.
            nats = norm = math.nan
        if not (math.isfinite(nats) and math.isfinite(norm)):
            self._stop_at_bad_step(nats, norm, before)
        self.optimizer.set_step(self.step + 1)
        self.optimizer.step()
        self._rows.commit()
        step_s = time.perf_counter() - start_s
        self._counters.add(nats, num_targets, norm, step_s)
        return StepMetrics(self.step, nats, num_targets, norm, step_s)

    def _next_segments(self) -> list[SegmentBatch]:
        """The segments of a step: one, or in the phase of crossbatch several."""
        config = self.config
        in_phase = self.step < config.crossbatch_share * config.steps
        num_segments = 1 + (config.crossbatch_segments if in_phase else 0)
        batches = [next(self.loader)]
        while len(batches) < num_segments and not self.loader.starts_document:
            batches.append(next(self.loader))
        return batches

    def _draw_open_rows(self) -> Tensor:
        """Which rows read their memory in this segment."""
        if self.step < self.config.memory_start_step:
            return torch.zeros(self.config.rows, dtype=torch.bool)
        draws = torch.rand(self.config.rows, generator=self._closing)
        return draws >= self.config.memory_closed_share

    def _stop_at_bad_step(self, nats: float, norm: float, before: _Position) -> None:
        self.optimizer.zero_grad()
        seen = f"gradient norm is {norm}" if math.isfinite(nats) else f"loss is {nats}"
        saved = ""
        if self._run_dir is not None and self._has_finite_weights():
            path = locate_checkpoint(self._run_dir, self.step)
            if self.step != self._saved_step:
                path = self._write_checkpoint(before)
            saved = f"; the state before it is saved in {path}"
        raise NonFiniteLossError(
            f"training stopped: at step {self.step + 1} the {seen}{saved}; lower "
            "training.learning_rate, raise training.warmup_steps or set training.clip_norm, and "
            "resume, from an earlier checkpoint if it happens again"
        )

    def _has_finite_weights(self) -> bool:
        finite = [torch.isfinite(p).all() for p in self.model.parameters()]
        return bool(torch.stack(finite).all())

    def _evaluate(self) -> bool:
        """Evaluate on the validation documents; whether it is the best so far."""
        if not self._validator:
            return False
        shape = self.model.config
        is_open = shape.has_memory and self.step > self.config.memory_start_step
        capacity = shape.capacity if is_open else 0
        result, is_best = self._validator.evaluate(
            self.model, self.step, capacity, self._reporter.make_evaluation_progress(self.step)
        )
        self._reporter.log_validation(self.step, result, is_best)
        return is_best

    def save(self) -> Path | None:
        """Save a checkpoint where there is a run folder; then delete those not to be kept.

        Raises:
            NonFiniteLossError: a weight is NaN or infinite; nothing is saved.
            ResourceError: no space left; earlier checkpoints are unharmed.
        """
        if self._run_dir is None:
            return None
        if self.step == self._saved_step:
            return locate_checkpoint(self._run_dir, self.step)
        if not self._has_finite_weights():
            raise NonFiniteLossError(
                f"training stopped: after step {self.step} weights are NaN or infinite, and "
                "nothing was saved; resume with a lower training.learning_rate"
            )
        path = self._write_checkpoint(self._capture_position())
        prune_checkpoints(self._run_dir, self.config.keep_checkpoints, self._validator.best_step)
        return path

    def _capture_position(self) -> _Position:
        generators = capture_generators(self._closing, self._device)
        return _Position(self.loader.state_dict(), generators)

    def _write_checkpoint(self, position: _Position) -> Path:
        assert self._run_dir is not None
        tensors, numbers = self.optimizer.state_dict()
        trainer = {
            "counters": self._counters.to_dict(),
            "loader": position.loader,
            "validation": self._validator.to_dict(),
            "optimizer": numbers,
            "precision": self.precision.name,
        }
        state = {**self._rows.state_dict(), **position.generators}
        path = locate_checkpoint(self._run_dir, self.step)
        save_model(path, self.model, self._tokenizer, TrainingState(tensors, state, trainer))
        self._saved_step = self.step
        return path

    def load(self, checkpoint: Path) -> None:
        """Go on from a checkpoint: the next step is bit for bit that of a run that never stopped.

        Changes the model, the loader and torch's global generators.

        Raises:
            CheckpointError: truncated, altered, or of another model, corpus, tokenizer, batch,
                optimizer or precision.
        """
        training = load_training_state(checkpoint)
        values = training.trainer
        if values["precision"] != self.precision.name:
            raise CheckpointError(
                f"{checkpoint} was trained in {values['precision']} and this run is in "
                f"{self.precision.name}; resume with training.precision = {values['precision']!r}"
            )
        load_weights(checkpoint, self.model, self._tokenizer)
        self.loader.load_state_dict(values["loader"])
        self.optimizer.load_state_dict(training.optimizer, values["optimizer"])
        rows = {name: t for name, t in training.state.items() if name.startswith("row.")}
        self._rows.load_state_dict(rows)
        self._validator.load_dict(values["validation"])
        self._counters = Counters.from_dict(values["counters"])
        self._saved_step = self.step
        restore_generators(training.state, self._closing, self._device)


@dataclass(frozen=True)
class _Position:
    """What a step uses up: taken before it, so that a step that fails can be tried again."""

    loader: dict[str, Any]
    generators: dict[str, Tensor]
