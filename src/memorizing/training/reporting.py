"""What training tells while it runs and when it ends: validation, results, metrics, progress."""

from __future__ import annotations

import dataclasses
import json
import operator
import os
import socket
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from memorizing.data import RowLoader, TokenizedDocument
from memorizing.data.loader import hash_documents
from memorizing.errors import CorpusError
from memorizing.evaluation import EvaluationResult, Progress
from memorizing.settings import flatten_tables
from memorizing.storage.files import describe_failure, explain_failures, write_bytes
from memorizing.terminal import Display

METRICS_FILE = "metrics.jsonl"
TENSORBOARD_FOLDER = "tensorboard"
MISSING_TENSORBOARD = (
    "no TensorBoard log: tensorboard is not installed (pip install 'memorizing[tensorboard]')"
)
_SHOW_INTERVAL_S = 0.25
_RECENT_STEPS = 100
_Counts = TypeVar("_Counts")
_MIN_SEGMENTS = 4
"""Held-out documents are read at least this far, so that there is something in memory to find."""


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


@dataclass
class Window:
    """Sums over the steps since the last line of the metrics."""

    steps: int = 0
    nats: float = 0.0
    num_targets: int = 0
    grad_norm: float = 0.0
    seconds: float = 0.0


@dataclass
class Counters:
    """Counts of a run since its first step, in all its sessions."""

    step: int = 0
    """Steps taken."""
    tokens: int = 0
    """Target tokens read."""
    seconds: float = 0.0
    recent: deque[tuple[float, int]] = field(default_factory=lambda: deque(maxlen=_RECENT_STEPS))
    """Summed nats and target tokens of the last steps."""
    window: Window = field(default_factory=Window)

    def add(self, nats: float, num_targets: int, grad_norm: float, seconds: float) -> None:
        """Count a step."""
        self.step += 1
        self.tokens += num_targets
        self.recent.append((nats, num_targets))
        window = self.window
        window.steps += 1
        window.nats += nats
        window.num_targets += num_targets
        window.grad_norm += grad_norm
        window.seconds += seconds

    @property
    def recent_nats(self) -> float:
        """Nats per token over the last steps, at most 100; NaN before the first."""
        num_targets = sum(count for _, count in self.recent)
        return sum(nats for nats, _ in self.recent) / num_targets if num_targets else float("nan")

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON, exact."""
        return dataclasses.asdict(self) | {"recent": list(self.recent)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Counters:
        """The counters that `to_dict` described.

        Raises:
            TypeError, ValueError: values that are no numbers, or below 0.
        """
        recent = deque(
            [(float(nats), operator.index(count)) for nats, count in values["recent"]],
            maxlen=_RECENT_STEPS,
        )
        read = {**values, "recent": recent, "window": _read_counts(Window, values["window"])}
        return _read_counts(cls, read)


def _read_counts(cls: type[_Counts], values: Mapping[str, Any]) -> _Counts:
    read = dict(values)
    for name, default in vars(cls()).items():
        if isinstance(default, (int, float)):
            convert = float if isinstance(default, float) else operator.index
            read[name] = convert(values[name])
            if read[name] < 0:
                raise ValueError(f"{name} is {values[name]}")
    return cls(**read)


@dataclass(frozen=True)
class Evaluation:
    """What one evaluation found."""

    result: EvaluationResult
    """With the memory that is trained."""
    without: EvaluationResult | None = None
    """Without memory, where that was read too."""
    parts: Mapping[str, EvaluationResult] = field(default_factory=dict)
    """What it is made of, and what it is compared with, by name."""


class HeldOut:
    """The same tokens each time, and which result on them was the best.

    Attributes:
        documents: about so many tokens from the beginnings of documents.
        max_tokens: of each document.
        start_token: precedes every document.
        best_step: of the best evaluation, which had `best_nats` per token.
        last_nats: per token, of the last evaluation.
    """

    def __init__(
        self, documents: Sequence[TokenizedDocument], loader: RowLoader, num_tokens: int
    ) -> None:
        """Choose about `num_tokens` tokens, to be read as `loader` reads."""
        self.start_token = loader.start_token
        self.max_tokens = max(
            num_tokens // max(len(documents), 1), _MIN_SEGMENTS * loader.segment_len
        )
        self.documents: list[TokenizedDocument] = []
        left = num_tokens
        for document in documents:
            if left > 0:
                self.documents.append(document)
                left -= min(len(document.tokens), self.max_tokens)
        self._read = [len(self.documents), self.max_tokens]
        self._identity = list(hash_documents(documents)) if documents else None
        self.best_step: int | None = None
        self.best_nats: float | None = None
        self.last_nats: float | None = None

    def __bool__(self) -> bool:
        """Whether there is something to evaluate on."""
        return bool(self.documents)

    def judge(self, step: int, result: EvaluationResult) -> bool:
        """Remember a result; whether it is the best so far."""
        self.last_nats = result.nats / result.tokens
        is_best = self.best_nats is None or self.last_nats < self.best_nats
        if is_best:
            self.best_step, self.best_nats = step, self.last_nats
        return is_best

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        kept = {name: getattr(self, name) for name in ("best_step", "best_nats", "last_nats")}
        return {"documents": self._identity, "read": self._read, **kept}

    def load_dict(self, values: dict[str, Any]) -> None:
        """Put back what `to_dict` gave.

        Where other amounts of the same documents are read now, the next result counts as the best:
        it cannot be compared with those before. A run may go on without validation. What was saved
        before documents were compared is taken as it is.

        Raises:
            CorpusError: results so far are on other documents, or the same with other text.
            TypeError, ValueError: results that are no numbers.
        """
        saved, read = values.get("documents"), values.get("read", self._read)
        if self._identity is None:
            self._identity, self._read = saved, read
        elif saved not in (None, self._identity):
            raise CorpusError(
                "the run was validated on other documents, or on the same with other text, and its "
                "best result cannot be compared with theirs; resume with the same ones, without "
                "validation, or start a new run"
            )
        for name, convert in (
            ("best_step", operator.index), ("best_nats", float), ("last_nats", float)
        ):  # fmt: skip
            value = values[name]
            setattr(self, name, None if value is None else convert(value))
        if read != self._read:
            self.best_nats = None


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


class Reporter:
    """Writes the metrics and moves the progress display."""

    def __init__(self, display: Display, measure_fill: Callable[[], dict[int, float]]) -> None:
        """Show on a display; `measure_fill` gives per memory layer the share of slots in use."""
        self.display = display
        self._measure_fill = measure_fill
        self._log: MetricsLog | None = None
        self._shown_s = 0.0

    def start(self, step: int, last_step: int) -> None:
        """Begin to show progress."""
        self._shown_s = 0.0
        self.display.start(step, last_step)

    def open(self, run_dir: Path, step: int) -> None:
        """Write metrics into a run's folder, continued after `step`."""
        self._log = MetricsLog(
            run_dir / METRICS_FILE, run_dir / TENSORBOARD_FOLDER, step, self.display.say
        )

    def close(self) -> None:
        """End."""
        self.display.stop()
        if self._log is not None:
            self._log.close()
            self._log = None

    def show(
        self,
        metrics: StepMetrics,
        recent_nats: float,
        describe_heads: Callable[[], dict[str, Any]],
        is_last: bool,
    ) -> None:
        """Move the progress display, a few times a second at most."""
        if not is_last and time.monotonic() - self._shown_s < _SHOW_INTERVAL_S:
            return
        self._shown_s = time.monotonic()
        facts = {
            "loss": f"{recent_nats:.3f}",
            "tokens/s": f"{metrics.num_targets / metrics.step_s:,.0f}",
        }
        if fills := self._measure_fill().values():
            facts["memory"] = f"{sum(fills) / len(fills):.0%}"
        gates = [gate for layer in describe_heads().get("gate", {}).values() for gate in layer]
        if gates:
            facts["gates"] = f"{min(gates):.2f}-{max(gates):.2f}"
        self.display.update(metrics.step, facts)

    def make_evaluation_progress(self, step: int) -> Progress:
        """What an evaluation after a step calls to move the progress display."""

        def progress(done: int, total: int) -> None:
            if time.monotonic() - self._shown_s >= _SHOW_INTERVAL_S:
                self._shown_s = time.monotonic()
                self.display.update(step, {"evaluating": f"{done / total:.0%}"})

        return progress

    def log_training(
        self, step: int, window: Window, counted: dict[str, Any], heads: dict[str, Any]
    ) -> None:
        """Write a line about the steps of a window: what was `counted`, and how the heads are."""
        values = {
            "nats_per_token": window.nats / max(window.num_targets, 1),
            "tokens_per_s": window.num_targets / window.seconds,
            "grad_norm": window.grad_norm / window.steps,
            **counted,
            **heads,
        }
        self._write(step, {"train": values})

    def log_validation(self, step: int, evaluation: Evaluation, is_best: bool) -> None:
        """Write a line about an evaluation, and say it."""
        result, without = evaluation.result, evaluation.without
        values = _describe_result(result)
        said = f"perplexity {result.perplexity:.3f}"
        if without is not None:
            values["off"] = _describe_result(without)
            said += f" with memory, {without.perplexity:.3f} without"
        if parts := {name: _describe_result(one) for name, one in evaluation.parts.items()}:
            values |= parts
            nats = (f"{one['nats_per_token']:.3f} {name}" for name, one in parts.items())
            said += f"; nats a token {', '.join(nats)}"
        self._write(step, {"validation": {**values, "is_best": is_best}})
        note = " (best so far)" if is_best else ""
        self.display.say(f"step {step}: validation {said}{note}")

    def _write(self, step: int, values: dict[str, Any]) -> None:
        if self._log is not None:
            self._log.write(step, values)


def _describe_result(result: EvaluationResult) -> dict[str, Any]:
    return {
        "nats_per_token": result.nats / result.tokens,
        "perplexity": result.perplexity,
        "tokens": result.tokens,
        "capacity": result.capacity,
    }


class MetricsLog:
    """One JSON object a line, each with `step`; the same numbers go to TensorBoard.

    A log that is opened at step n forgets what an earlier session wrote after n: the resumed run
    writes it again. TensorBoard is a convenience: where it is missing, or cannot write, that is
    said once and training goes on.
    """

    def __init__(
        self,
        path: Path,
        tensorboard_dir: Path | None = None,
        step: int = 0,
        say: Callable[[str], None] = lambda _: None,
    ) -> None:
        """Open the log for the steps after `step`.

        Args:
            path: the JSONL file.
            tensorboard_dir: folder for TensorBoard; None writes none.
            step: lines of later steps, and lines that are not whole, are dropped.
            say: told why there is no TensorBoard log though one was asked for.
        """
        self.path, self._say = path, say
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists():
            kept = [line for line in read_metrics(path) if line["step"] <= step]
            write_bytes(path, "".join(json.dumps(line) + "\n" for line in kept).encode())
        # Unbuffered: a line that a full disk refused is not tried again when the file is closed.
        self._file = path.open("ab", buffering=0)
        self._events: _EventFile | None = None
        if tensorboard_dir is not None:
            try:
                self._events = _EventFile(tensorboard_dir, step)
            except ImportError:
                say(MISSING_TENSORBOARD)
            except OSError as error:
                self._give_up_tensorboard(error)

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """Append a line. Nested mappings and lists of numbers become one TensorBoard scalar each.

        Raises:
            ResourceError: no space left.
        """
        with explain_failures(self.path):
            self._file.write((json.dumps({"step": step, **values}) + "\n").encode())
        if self._events is not None:
            try:
                self._events.write(step, dict(_list_scalars(values)))
            except OSError as error:
                self._give_up_tensorboard(error)

    def close(self) -> None:
        """Close the files."""
        self._file.close()
        if self._events is not None:
            self._events.file.close()

    def _give_up_tensorboard(self, error: OSError) -> None:
        self._events = None
        self._say(f"the TensorBoard log ends here, the metrics go on: {describe_failure(error)}")


class _EventFile:
    """Scalars for TensorBoard, written at once.

    The writer of `torch.utils.tensorboard` has a thread, whose errors nobody catches.
    """

    def __init__(self, folder: Path, step: int) -> None:
        """Begin a file after `step`: what an earlier one has of later steps does not count.

        Raises:
            ImportError: tensorboard is not installed.
            OSError: the file cannot be written.
        """
        from tensorboard.compat.proto import event_pb2
        from tensorboard.summary.writer.record_writer import RecordWriter

        protocol: Any = event_pb2  # its classes are made when it is imported
        self._make_event = protocol.Event
        folder.mkdir(parents=True, exist_ok=True)
        name = f"events.out.tfevents.{time.time_ns()}.{socket.gethostname()}.{os.getpid()}"
        self.file = (folder / name).open("xb", buffering=0)
        self._records = RecordWriter(self.file)
        self._add(file_version="brain.Event:2")
        self._add(step=step + 1, session_log={"status": protocol.SessionLog.START})

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        """Add numbers by name.

        Raises:
            OSError: they cannot be written.
        """
        values = [{"tag": name, "simple_value": value} for name, value in scalars.items()]
        self._add(step=step, summary={"value": values})

    def _add(self, **event: Any) -> None:
        self._records.write(self._make_event(wall_time=time.time(), **event).SerializeToString())


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a log; those that are damaged or half-written are left out."""
    lines = []
    for text in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            line = json.loads(text)
        except (ValueError, RecursionError):
            continue
        if isinstance(line, dict) and type(line.get("step")) is int:
            lines.append(line)
    return lines


def _list_scalars(values: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    for name, value in flatten_tables(values, "/").items():
        if isinstance(value, (list, tuple)):
            yield from _list_scalars({name: {str(i): item for i, item in enumerate(value)}})
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            yield name, float(value)
