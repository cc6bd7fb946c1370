"""The training loop: one for every kind of model.

A step reads the next segment of every row (in crossbatch the next few): forward, loss and backward;
then clip, update, commit. What differs between kinds of models is what `TrainingLoop` leaves open.
"""

from __future__ import annotations

import hashlib
import math
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, NamedTuple, TypedDict, Unpack, final

import torch
from torch import Tensor

from memorizing.config import TrainingConfig
from memorizing.data import RowLoader, SegmentBatch, TokenizedDocument
from memorizing.errors import (
    CheckpointError,
    ConfigError,
    NonFiniteLossError,
    NonFiniteQueryError,
)
from memorizing.evaluation import Progress
from memorizing.ranks import ALONE, Ranks, Shards
from memorizing.storage.tensors import MaybeAwaited, fetch_tensors
from memorizing.terminal import Display, SilentDisplay
from memorizing.training.checkpoint import (
    TrainingState,
    explain_damage,
    load_training_state,
    locate_checkpoint,
    prune_checkpoints,
    write_checkpoint,
)
from memorizing.training.optimizer import Optimizer
from memorizing.training.reporting import (
    Counters,
    Evaluation,
    HeldOut,
    Reporter,
    StepMetrics,
    TrainingResult,
    Window,
)
from memorizing.training.stopping import catch_stop_signals


class LoopOptions(TypedDict, total=False):
    """What a loop may be given besides what it trains."""

    run_dir: Path | None
    """Folder for checkpoints, metrics and TensorBoard; without one nothing is written."""
    validation: Sequence[TokenizedDocument]
    """Documents of the evaluations during training."""
    display: Display | None
    """What a person sees; None is nothing."""
    on_step: Callable[[StepMetrics], None] | None
    """Called after every step."""
    on_begin: Callable[[], None] | None
    """Called once, in the main process, after the first step and before anything is written."""
    ranks: Ranks
    """The processes that train together; by default this one alone."""
    shards: Shards | None
    """Of a model whose weights they hold in parts."""


class Histories(ABC):
    """What a model remembers of the documents in the rows that this process reads."""

    @abstractmethod
    def commit(self) -> None:
        """Go on from the segments that were read last: their entries become retrievable."""

    @abstractmethod
    def measure_fill(self) -> dict[int, float]:
        """Per memory layer, entries held / entries that these rows could hold."""

    @abstractmethod
    def state_dict(self) -> dict[str, Tensor]:
        """All histories as of the last commit, as `row.<global row>.<name>`, by reference."""

    @abstractmethod
    def load_state_dict(self, tensors: Mapping[str, Tensor]) -> None:
        """Put back what `state_dict` gave, of all rows of the run: each takes its own. In place.

        Raises:
            CheckpointError: they are of another model, capacity or number of rows.
        """


class _Position(NamedTuple):
    """What a step uses up: taken before it, so that a step that fails can be tried again."""

    loader: dict[str, Any]
    generators: dict[str, Tensor]


class TrainingLoop(ABC):
    """Trains a model in place; `load` goes on from a checkpoint, `run` takes the steps.

    Everything is decided here but what a step of *this* model computes, what it keeps in a
    checkpoint and what it tells: the abstract methods.

    Nothing is written before the first step of a session has been taken.

    Several processes (`LoopOptions.ranks`) hold the same weights, loader and optimizer. Each reads
    rows of its own, with their histories; gradients and nats are summed, and the main process
    writes what one process would. Where weights are in parts (`shards`), all compute in step: with
    as many rows each, and evaluations read all documents in every process.
    """

    settings_prefix: str
    """Before the names of settings in messages."""

    def __init__(
        self,
        config: TrainingConfig,
        loader: RowLoader,
        optimizer: Optimizer,
        rows: Histories,
        device: torch.device,
        **options: Unpack[LoopOptions],
    ) -> None:
        """Prepare to train from the beginning.

        Args:
            config: how to train.
            loader: gives batches of `config.rows` rows; training ends early where it does.
            optimizer: of everything that is trained.
            rows: the histories, empty.
            device: where the model is.
            options: see `LoopOptions`.

        Raises:
            ConfigError: rows that cannot be dealt.
        """
        self.config, self.loader, self.optimizer = config, loader, optimizer
        self._run_dir, self._on_step = options.get("run_dir"), options.get("on_step")
        self._on_begin, self._rows, self._device = options.get("on_begin"), rows, device
        self._ranks = options.get("ranks", ALONE)
        self._shards = options.get("shards")
        self._evaluating = ALONE if self._shards else self._ranks
        """The processes that deal the documents of an evaluation among them."""
        self._mine = self._ranks.deal(config.rows)
        if self._shards and config.rows % self._ranks.size:
            name = self.settings_prefix
            raise ConfigError(
                f"{name}shard is true and {name}rows is {config.rows}, which {self._ranks.size} "
                "processes cannot deal equally; give a multiple of the processes"
            )
        self._held_out = HeldOut(options.get("validation", ()), loader, config.evaluate_tokens)
        self._reporter = Reporter(options.get("display") or SilentDisplay(), rows.measure_fill)
        self._draws = torch.Generator().manual_seed(config.seed)
        """Of what a step draws, besides torch's own generators (dropout)."""
        self._counters = Counters()
        self._saved_step = -1
        self._has_begun = False

    @abstractmethod
    def _open(self) -> AbstractContextManager[None]:
        """Within this context steps are taken: the model is in training mode."""

    @abstractmethod
    def _read(self, batches: Sequence[SegmentBatch], num_targets: int) -> float:
        """Forward and backward over the next segments of own rows; gives the summed nats.

        Gradients of the summed nats / `num_targets`, which counts all rows of all batches, add to
        the parameters'.
        """

    @abstractmethod
    def _identify(self) -> dict[str, Any]:
        """Settings by name that must be the same when a run goes on, as JSON holds them."""

    @abstractmethod
    def _write_model(self, folder: Path) -> None:
        """Write the weights, and what is needed to use them, into an empty folder."""

    @abstractmethod
    def _list_weights(self) -> MaybeAwaited:
        """The tensors of the model that `_write_model` writes; those in parts are awaited."""

    @abstractmethod
    def _load_model(self, folder: Path) -> None:
        """Copy the weights of a checkpoint into the model. In place.

        Raises:
            CheckpointError: truncated, altered or of another model.
        """

    @abstractmethod
    def _evaluate(self, held_out: HeldOut, progress: Progress) -> Evaluation:
        """Read the documents that are held out, with the memory as it is after this step."""

    @abstractmethod
    def _describe_heads(self) -> dict[str, Any]:
        """What is logged of gates and scales."""

    @property
    def step(self) -> int:
        """Steps taken."""
        return self._counters.step

    @final
    def run(self, until: int | None = None) -> TrainingResult:
        """Train up to a step (by default the last), the documents' end, or SIGINT or SIGTERM.

        A signal lets the present step finish; then, as at every end, a checkpoint is saved. A
        second signal acts as it usually does.

        Raises:
            NonFiniteLossError: the loss or a gradient is NaN or infinite. The weights are those
                before the step, and saved where a step was taken before.
            ResourceError: no space left; earlier checkpoints are unharmed.
        """
        last = self.config.steps if until is None else min(until, self.config.steps)
        with catch_stop_signals() as stop:
            try:
                self._reporter.start(self.step, last)
                self._check_ranks()
                with self._open():
                    was_stopped = self._run_steps(last, stop)
                    self.save()
            finally:
                self._reporter.close()
        interrupted = was_stopped and self.step < last
        if interrupted:
            name = stop[0] if stop else "a signal to another process"
            self._reporter.display.say(f"{name}: stopped after step {self.step}; resume to go on")
        return TrainingResult(
            self._run_dir,
            self.step,
            self._counters.tokens,
            self._counters.seconds,
            interrupted,
            self._counters.recent_nats,
            self._held_out.last_nats,
        )

    def _check_ranks(self) -> None:
        """Refuse ranks that would train something else.

        Raises:
            RankError: with the ranks, and what differs.
        """
        if self._ranks.size > 1:
            self._ranks.check_equal("step", self.step)
            self._ranks.check_equal("setting", [repr(self.config), self._identify()])
            self._ranks.check_equal("list of documents", self.loader.state_dict())
            self._ranks.check_equal("set of weights", self.optimizer.hash_whole())
            self._reporter.display.say(f"{self._ranks.size} processes read {self.config.rows} rows")

    def _run_steps(self, last: int, stop: list[str]) -> bool:
        """Take steps up to `last`; whether a signal ended them before."""
        counters, config = self._counters, self.config
        before_s = counters.seconds - time.monotonic()
        is_first = True
        while self.step < last:
            if self._ranks.is_any(bool(stop) and not is_first):
                return True
            metrics = self._take_step()
            if metrics is None:
                self._reporter.display.say(f"the documents ended after step {self.step}")
                return False
            counters.seconds = before_s + time.monotonic()
            if is_first:
                self._begin()
                is_first = False
            if self._on_step is not None:
                self._on_step(metrics)
            self._reporter.show(
                metrics, counters.recent_nats, self._describe_heads, is_last=self.step == last
            )
            if self._is_due(config.log_every, at_end=True):
                window, counters.window = counters.window, Window()
                values = {
                    "tokens": counters.tokens,
                    "epoch": self.loader.epoch,
                    "seconds": counters.seconds,
                    "rate": self.optimizer.rates(),
                }
                values["memory_fill"] = self._measure_fill()
                self._reporter.log_training(self.step, window, values, self._describe_heads())
            is_best = self._is_due(config.evaluate_every, at_end=True) and self._judge()
            counters.seconds = before_s + time.monotonic()
            if is_best or self._is_due(config.checkpoint_every):
                self.save()
        return False

    def _begin(self) -> None:
        """Write from now on: the session's first step has been taken."""
        if not self._has_begun and self._on_begin is not None and self._ranks.is_main:
            self._on_begin()
        self._has_begun = True
        if self._run_dir is not None and self._ranks.is_main:
            self._reporter.open(self._run_dir, self.step - 1)

    def _measure_fill(self) -> dict[str, float]:
        """Of all rows, by layer."""
        fills = self._rows.measure_fill()
        held = self._ranks.sum([fill * len(self._mine) for fill in fills.values()])
        return {
            str(layer): total / self.config.rows for layer, total in zip(fills, held, strict=True)
        }

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
        if self._ranks.size > 1:
            # Dropout of its own in every rank, and the same again after a resume.
            torch.manual_seed(self._seed_step())
        try:
            nats = self._read([batch.take_rows(self._mine) for batch in batches], num_targets)
        except NonFiniteQueryError:
            # What the search refuses would have made the loss NaN.
            nats = math.nan
        (nats,) = self._ranks.sum([nats])
        self.optimizer.sum_gradients(self._ranks)
        norm = self.optimizer.clip_gradients(self.config.clip_norm)
        if not (math.isfinite(nats) and math.isfinite(norm)):
            self._stop_at_bad_step(nats, norm, before)
        self.optimizer.set_step(self.step + 1)
        self.optimizer.step()
        self._rows.commit()
        step_s = time.perf_counter() - start_s
        self._counters.add(nats, num_targets, norm, step_s)
        return StepMetrics(self.step, nats, num_targets, norm, step_s)

    def _seed_step(self) -> int:
        name = f"{self.config.seed}/{self.step}/{self._mine.start}"
        return int.from_bytes(hashlib.sha256(name.encode()).digest()[:7])

    def _next_segments(self) -> list[SegmentBatch]:
        """The segments of a step: one, or in the phase of crossbatch several."""
        config = self.config
        in_phase = self.step < config.crossbatch_share * config.steps
        num_segments = 1 + (config.crossbatch_segments if in_phase else 0)
        batches = [next(self.loader)]
        while len(batches) < num_segments and not self.loader.starts_document:
            batches.append(next(self.loader))
        return batches

    def _stop_at_bad_step(self, nats: float, norm: float, before: _Position) -> None:
        self.optimizer.zero_grad()
        seen = f"gradient norm is {norm}" if math.isfinite(nats) else f"loss is {nats}"
        saved = ""
        if self._run_dir is not None and self.step == self._saved_step:
            saved = (
                f"; the state before it is saved in {locate_checkpoint(self._run_dir, self.step)}"
            )
        elif self._run_dir is not None and self._has_begun and self._has_finite_weights():
            saved = f"; the state before it is saved in {self._write_checkpoint(before)}"
        name = self.settings_prefix
        raise NonFiniteLossError(
            f"training stopped: at step {self.step + 1} the {seen}{saved}; lower "
            f"{name}learning_rate, raise {name}warmup_steps or set {name}clip_norm, and "
            + (
                "resume; if it happens again, delete the newest folders of checkpoints first, so "
                "that it resumes from an earlier one"
                if saved
                else "start again"
            )
        )

    def _has_finite_weights(self) -> bool:
        finite = [torch.isfinite(p).all().to(self._device) for p in self.optimizer.parameters()]
        # One wait for a GPU, not one per weight.
        return not self._ranks.is_any(not bool(torch.stack(finite).all()))

    def _judge(self) -> bool:
        """Evaluate on the validation documents; whether it is the best so far."""
        if not self._held_out:
            return False
        progress = self._reporter.make_evaluation_progress(self.step)
        evaluation = self._evaluate(self._held_out, progress)
        is_best = self._held_out.judge(self.step, evaluation.result)
        self._reporter.log_validation(self.step, evaluation, is_best)
        return is_best

    @final
    def save(self) -> Path | None:
        """Save a checkpoint where there is a run folder; then delete those not to be kept.

        Raises:
            NonFiniteLossError: a weight is NaN or infinite; nothing is saved.
            ResourceError: no space left; earlier checkpoints are unharmed.
        """
        if self._run_dir is None:
            return None
        if self.step != self._saved_step:
            if not self._has_begun:
                return None
            if not self._has_finite_weights():
                raise NonFiniteLossError(
                    f"training stopped: after step {self.step} weights are NaN or infinite, and "
                    f"nothing was saved; resume with a lower {self.settings_prefix}learning_rate"
                )
            self._write_checkpoint(self._capture_position())
        # Also where it was saved before: the process may have been killed before it deleted.
        if self._ranks.is_main:
            best = self._held_out.best_step
            prune_checkpoints(self._run_dir, self.config.keep_checkpoints, best, self.step)
        return locate_checkpoint(self._run_dir, self.step)

    def _capture_position(self) -> _Position:
        generators = {"rng.torch": torch.get_rng_state(), "rng.closing": self._draws.get_state()}
        if self._device.type == "cuda":
            generators["rng.cuda"] = torch.cuda.get_rng_state(self._device)
        return _Position(self.loader.state_dict(), generators)

    def _write_checkpoint(self, position: _Position) -> Path:
        assert self._run_dir is not None
        path = locate_checkpoint(self._run_dir, self.step)
        if self._ranks.size > 1:
            name = f"set of weights after step {self.step}"
            self._ranks.check_equal(name, self.optimizer.hash_whole())
        rows = self._ranks.collect(self._rows.state_dict())
        if self._ranks.is_main:
            self._write_files(path, rows, position)
        elif self._shards:
            # In the order in which they are written.
            for tensors in (self._list_weights(), self.optimizer.state_dict()[0]):
                for _ in fetch_tensors(tensors):
                    pass
        self._ranks.wait()
        self._saved_step = self.step
        return path

    def _write_files(self, path: Path, rows: dict[str, Tensor], position: _Position) -> None:
        tensors, numbers = self.optimizer.state_dict()
        trainer = {
            "counters": self._counters.to_dict(),
            "loader": position.loader,
            "validation": self._held_out.to_dict(),
            "optimizer": numbers,
            **{name.rpartition(".")[2]: value for name, value in self._identify().items()},
        }
        state = {**rows, **position.generators}
        # What is trained is what is saved of a model.
        num_bytes = sum(p.numel() * p.element_size() for p in self.optimizer.parameters())
        num_bytes *= self._ranks.size if self._shards else 1
        training = TrainingState(tensors, state, trainer)
        write_checkpoint(path, self._write_model, num_bytes, training)

    @final
    def load(self, checkpoint: Path) -> None:
        """Go on from a checkpoint: the next step is bit for bit that of a run that never stopped.

        Changes the model, the loader and torch's global generators.

        Raises:
            CheckpointError: truncated, altered, or of another model, tokenizer, memory, batch,
                optimizer or precision.
            CorpusError: of other documents.
        """
        training = load_training_state(checkpoint)
        values = training.trainer
        for name, mine in self._identify().items():
            saved = values.get(name.rpartition(".")[2])
            if saved != mine:
                raise CheckpointError(
                    f"{checkpoint} was trained with {name} = {saved!r} and this run has {mine!r}; "
                    "resume with the base model, memory and precision it began with"
                )
        self._load_model(checkpoint)
        with explain_damage(checkpoint):
            self.loader.load_state_dict(values["loader"])
            self.optimizer.load_state_dict(training.optimizer, values["optimizer"])
            rows = {n: t for n, t in training.state.items() if n.startswith("row.")}
            self._rows.load_state_dict(rows)
            self._held_out.load_dict(values["validation"])
            self._counters = Counters.from_dict(values["counters"])
            torch.set_rng_state(training.state["rng.torch"])
            self._draws.set_state(training.state["rng.closing"])
            if self._device.type == "cuda" and "rng.cuda" in training.state:
                torch.cuda.set_rng_state(training.state["rng.cuda"], self._device)
        self._saved_step = self.step
