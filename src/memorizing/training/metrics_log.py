"""Metrics of a run as JSON lines, and for TensorBoard where it is installed."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from memorizing.storage.files import write_bytes
from memorizing.training.folder import explain_full_disk

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

MISSING_TENSORBOARD = (
    "no TensorBoard log: tensorboard is not installed (pip install 'memorizing[tensorboard]')"
)


class MetricsLog:
    """One JSON object a line, each with `step`; the same numbers go to TensorBoard.

    A log that is opened at step n forgets what an earlier session wrote after n: the resumed run
    writes it again.
    """

    def __init__(self, path: Path, tensorboard_dir: Path | None = None, step: int = 0) -> None:
        """Open the log for the steps after `step`.

        Args:
            path: the JSONL file.
            tensorboard_dir: folder for TensorBoard; None writes none.
            step: lines of later steps, and a half-written last line, are dropped.
        """
        self.path = path
        self.message = ""
        """Why there is no TensorBoard log though one was asked for."""
        _truncate(path, step)
        # Unbuffered: a line that a full disk refused is not tried again when the file is closed.
        self._file = path.open("ab", buffering=0)
        self._writer = (
            self._open_tensorboard(tensorboard_dir, step) if tensorboard_dir is not None else None
        )

    def _open_tensorboard(self, folder: Path, step: int) -> SummaryWriter | None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            self.message = MISSING_TENSORBOARD
            return None
        return SummaryWriter(log_dir=str(folder), purge_step=step + 1)

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """Append a line. Nested mappings and lists of numbers become one TensorBoard scalar each.

        Raises:
            ResourceError: no space left.
        """
        with explain_full_disk(str(self.path)):
            self._file.write((json.dumps({"step": step, **values}) + "\n").encode())
        if self._writer is not None:
            for name, value in _flatten(values).items():
                self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        """Flush and close."""
        self._file.close()
        if self._writer is not None:
            self._writer.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a log, without a half-written last one."""
    lines = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            lines.append(json.loads(line))
        except ValueError:
            break
    return lines


def _truncate(path: Path, step: int) -> None:
    if path.exists():
        kept = [line for line in read_metrics(path) if line["step"] <= step]
        write_bytes(path, "".join(json.dumps(line) + "\n" for line in kept).encode())


def _flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, float]:
    flat: dict[str, float] = {}
    for key, value in values.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping):
            flat |= _flatten(value, f"{name}/")
        elif isinstance(value, (list, tuple)):
            flat |= _flatten({str(i): v for i, v in enumerate(value)}, f"{name}/")
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            flat[name] = float(value)
    return flat
