"""The finetuning loop."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from memorizing.data import SegmentLoader, TokenizedDocument
from memorizing.errors import CheckpointError, NonFiniteLossError, NonFiniteQueryError
from memorizing.huggingface.attaching.attachment import get_attachment, unwrap
from memorizing.huggingface.sessions.scoring import read_memory
from memorizing.training.checkpoint import TrainingState
from memorizing.training.checkpoints import (
    TRAINER_FILE,
    locate_checkpoint,
    prune_checkpoints,
)
from memorizing.training.counters import Counters, Window, capture_generators, restore_generators
from memorizing.training.finetuning.checkpoint import (
    load_checkpoint,
    write_checkpoint,
    write_result,
)
from memorizing.training.finetuning.reporting import FinetuneReporter
from memorizing.training.finetuning.rows import FinetuneRows
from memorizing.training.finetuning.settings import FinetuneSettings
from memorizing.training.finetuning.validation import FinetuneValidator
from memorizing.training.finetuning.weights import TrainedWeights, prepare_weights
from memorizing.training.folder import read_json
from memorizing.training.interruption import StopRequest, catch_stop_signals
from memorizing.training.optimizer import Optimizer, clip_gradients
from memorizing.training.progress import Display, SilentDisplay
from memorizing.training.reporting import StepMetrics, TrainingResult


class Finetuner:
    """Trains what makes a model use its memory, a segment of every row at a step.

    Forward, loss and backward, row after row; then clip, update, commit.

    `finetune` builds one in a run folder; experiments make their own. Without `run_dir` nothing is
    written to disk.
    """

    def __init__(
        self,
        model: Any,
        documents: Sequence[TokenizedDocument],
        start_token: int,
        settings: FinetuneSettings,
        *,
        run_dir: Path | None = None,
        validation: Sequence[TokenizedDocument] = (),
        display: Display | None = None,
        on_step: Callable[[StepMetrics], None] | None = None,
    ) -> None:
        """Prepare to train from the beginning; `load` goes on from a checkpoint.

        Args:
            model: of `transformers`, with `add_memory`. Trained in place, on its device; LoRA is
                added where `settings` want it, and which parameters require gradients is set.
            documents: read in an order that follows `settings.seed`, again and again.
            start_token: precedes every document.
            settings: how to train.
            run_dir: folder for checkpoints, metrics and TensorBoard.
            validation: documents of the evaluations during training.
            display: what a person sees; None is nothing.
            on_step: called after every step.

        Raises:
            ConfigError: nothing would be trained, or LoRA is in the way.
            IndexUnavailableError: LoRA without peft.
        """
        self.model = inner = unwrap(model)
        self.attachment = get_attachment(inner)
        self.settings = settings
        self._config = settings.make_training_config()
        self._run_dir, self._on_step = run_dir, on_step
        self._device = inner.get_input_embeddings().weight.device
        self._base_fingerprint = self.attachment.fingerprint()
        torch.manual_seed(settings.seed)
        prepare_weights(inner, self.attachment, settings)
        self.weights = TrainedWeights(inner, self.attachment)
        self.optimizer = Optimizer(self.weights.groups, self._config)
        memory = self.attachment.settings
        self.loader = SegmentLoader(
            documents,
            settings.rows,
            memory.segment_len,
            start_token,
            settings.seed,
            repeat=True,
        )
        self._rows = FinetuneRows(inner, self.attachment, settings.rows)
        self._validator = FinetuneValidator(
            validation, start_token, settings.evaluate_tokens, memory.segment_len
        )
        self._reporter = FinetuneReporter(
            display or SilentDisplay(), self.attachment, self.loader, self.optimizer, self._rows
        )
        self._unused = torch.Generator().manual_seed(settings.seed)
        self._counters = Counters()
        self._rows_before: dict[str, Tensor] = {}
        self._saved_step = -1

    @property
    def step(self) -> int:
        """Steps taken."""
        return self._counters.step

    def run(self, until: int | None = None) -> TrainingResult:
        """Train up to a step (by default the last), or SIGINT or SIGTERM.

        A signal lets the present step finish; then, as at every end, a checkpoint is saved. A
        second signal acts as it usually does. The model is in evaluation mode afterwards.

        Raises:
            NonFiniteLossError: the loss or a gradient is NaN or infinite. The weights are those
                before the step, and saved.
            ResourceError: no space left; earlier checkpoints are unharmed.
        """
        last = self.settings.steps if until is None else min(until, self.settings.steps)
        self.model.train()
        with catch_stop_signals() as stop:
            try:
                self._reporter.open(self._run_dir, self.step, last)
                with read_memory(self.attachment):
                    self._rows.load_state_dict(self._rows_before, self._find_doc_ends())
                    self._run_steps(last, stop)
                    # Histories end where the memory is left.
                    self._rows_before = self._capture_position().rows
                    self.save()
            finally:
                self._reporter.close()
                self.model.eval()
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
        counters, settings = self._counters, self.settings
        before_s = counters.seconds - time.monotonic()
        while self.step < last and not stop:
            metrics = self._take_step()
            counters.seconds = before_s + time.monotonic()
            if self._on_step is not None:
                self._on_step(metrics)
            self._reporter.show(metrics, counters, is_last=self.step == last)
            if self._is_due(settings.log_every, at_end=True):
                window, counters.window = counters.window, Window()
                self._reporter.log_training(counters, window)
            is_best = self._is_due(settings.evaluate_every, at_end=True) and self._evaluate()
            counters.seconds = before_s + time.monotonic()
            if is_best or self._is_due(settings.checkpoint_every):
                self.save()

    def _is_due(self, every: int, at_end: bool = False) -> bool:
        is_end = at_end and self.step == self.settings.steps
        return every > 0 and (self.step % every == 0 or is_end)

    def _take_step(self) -> StepMetrics:
        start_s = time.perf_counter()
        before = self._capture_position()
        batch = next(self.loader)
        self.optimizer.zero_grad()
        self.weights.zero_grad()
        try:
            nats = self._rows.read(batch)
            self.weights.take_gradients()
            norm = clip_gradients(self.optimizer.parameters(), self.settings.clip_norm)
        except NonFiniteQueryError:
            # What the search refuses would have made the loss NaN.
            nats = norm = math.nan
        if not (math.isfinite(nats) and math.isfinite(norm)):
            self._stop_at_bad_step(nats, norm, before)
        self.optimizer.set_step(self.step + 1)
        self.optimizer.step()
        self.weights.give_back()
        self._rows.commit()
        step_s = time.perf_counter() - start_s
        self._counters.add(nats, batch.num_targets, norm, step_s)
        return StepMetrics(self.step, nats, batch.num_targets, norm, step_s)

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
            f"finetuning stopped: at step {self.step + 1} the {seen}{saved}; lower the learning "
            "rate or take more warm-up steps, and start anew, or resume from an earlier checkpoint"
        )

    def _has_finite_weights(self) -> bool:
        return all(bool(torch.isfinite(p).all()) for p in self.optimizer.parameters())

    def _evaluate(self) -> bool:
        """Evaluate on the validation documents; whether it is the best so far."""
        if not self._validator:
            return False
        evaluation, is_best = self._validator.evaluate(
            self.model,
            self.step,
            self.attachment.settings.capacity,
            self._reporter.make_evaluation_progress(self.step),
        )
        self._reporter.log_validation(self.step, evaluation, is_best)
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
                f"finetuning stopped: after step {self.step} weights are NaN or infinite, and "
                "nothing was saved; resume with a lower learning rate"
            )
        path = self._write_checkpoint(self._capture_position())
        prune_checkpoints(self._run_dir, self.settings.keep_checkpoints, self._validator.best_step)
        return path

    def save_result(self, folder: Path) -> None:
        """Save what was learned, without what training needs to go on."""
        folder.mkdir(parents=True, exist_ok=True)
        write_result(folder, self.model, self.weights, with_model=self.settings.train == "all")

    def _find_doc_ends(self) -> Tensor:
        """(rows,) bool: the row's next segment begins a document."""
        rows = self.loader.state_dict()["rows"]
        lengths = [len(document.tokens) for document in self.loader.documents]
        return torch.tensor([index < 0 or place >= lengths[index] for index, place in rows])

    def _capture_position(self) -> _Position:
        generators = capture_generators(self._unused, self._device)
        rows = self._rows.state_dict(self._find_doc_ends())
        return _Position(self.loader.state_dict(), generators, rows)

    def _write_checkpoint(self, position: _Position) -> Path:
        assert self._run_dir is not None
        tensors, numbers = self.optimizer.state_dict()
        trainer = {
            "counters": self._counters.to_dict(),
            "loader": position.loader,
            "validation": self._validator.to_dict(),
            "optimizer": numbers,
            "train": self.settings.train,
            "dtype": str(self.model.dtype),
            "base": self._base_fingerprint,
        }
        state = {**position.rows, **position.generators}
        path = locate_checkpoint(self._run_dir, self.step)
        write_checkpoint(
            path,
            self.model,
            self.weights,
            TrainingState(tensors, state, trainer),
            with_model=self.settings.train == "all",
        )
        self._saved_step = self.step
        return path

    def load(self, checkpoint: Path) -> None:
        """Go on from a checkpoint: the next step is bit for bit that of a run that never stopped.

        Changes the model, the loader and torch's global generators.

        Raises:
            CheckpointError: truncated, altered, or of another model, corpus, tokenizer, memory or
                precision.
        """
        with_model = self.settings.train == "all"
        values = read_json(checkpoint / TRAINER_FILE)
        mine = {
            "train": self.settings.train,
            "dtype": str(self.model.dtype),
            "base": self._base_fingerprint,
        }
        for key, value in mine.items():
            if values.get(key) != value:
                raise CheckpointError(
                    f"{checkpoint} was trained with {key} = {values.get(key)!r} and this run has "
                    f"{value!r}; resume with the base model, memory and precision it began with"
                )
        training = load_checkpoint(
            checkpoint, self.model, self.attachment, self.weights, with_model=with_model
        )
        values = training.trainer
        self.loader.load_state_dict(values["loader"])
        self.optimizer.load_state_dict(training.optimizer, values["optimizer"])
        self._rows_before = {n: t for n, t in training.state.items() if n.startswith("row.")}
        self._validator.load_dict(values["validation"])
        self._counters = Counters.from_dict(values["counters"])
        self._saved_step = self.step
        restore_generators(training.state, self._unused, self._device)


@dataclass(frozen=True)
class _Position:
    """What a step uses up: taken before it, so that a step that fails can be tried again."""

    loader: dict[str, Any]
    generators: dict[str, Tensor]
    rows: dict[str, Tensor]
