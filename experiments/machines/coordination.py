"""What it costs to give documents out to many workers: they compute nothing.

    python experiments/machines/coordination.py --json coordination.json --workers 1 8 32

Every worker answers at once that it has read its batch, so that all that is measured is this
process and Ray. Beside it, how long a part of 16,384 entries takes to be taken over, in the shape
of SmolLM2-135M: one layer, and all 30. What is in the JSON already is not measured again.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from memorizing.benchmark.preparing import describe_machine
from memorizing.data import Document
from memorizing.memory import FolderDescription, MemoryFolder, NewDocument, hash_text
from memorizing.ray import RayReaders, reading
from memorizing.ray.cluster import join_cluster
from memorizing.storage.files import write_json

NUM_BATCHES, BATCH_BYTES = 2_000, 2**16
HEADS, WIDTH, ENTRIES = 3, 64, 16_384


class IdleWorker:
    """Reads nothing, and says that it has."""

    def open(self, load: Any, memory: Any, keep_text: bool) -> None:
        """Load nothing."""

    def read(self, documents: Any, place: Any) -> SimpleNamespace:
        """The documents, as if they were read."""
        return SimpleNamespace(num_tokens={one[0]: 1 for one in documents}, error=None)

    def stop(self) -> None:
        """Nothing is running."""


class IdleReaders(RayReaders):
    """Documents go to the workers as pairs, so that they need not import anything."""

    def _divide(self, documents: Any, parts: Path) -> Any:
        for batch in super()._divide(documents, parts):
            batch.documents = [(one.name, one.text) for one in batch.documents]  # type: ignore
            yield batch


def main() -> None:
    """Measure what is missing."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 8, 32])
    options = parser.parse_args()
    done: dict[str, Any] = json.loads(options.json.read_text()) if options.json.is_file() else {}

    def keep(name: str, measured: dict[str, float]) -> None:
        done[name] = measured
        print(name, measured, flush=True)
        write_json(options.json, {**done, "machine": describe_machine()})

    for workers in options.workers:
        if f"{workers} workers" not in done:
            with tempfile.TemporaryDirectory() as place:
                keep(f"{workers} workers", give_out(Path(place), workers))
    for layers in (1, 30):
        if f"taking over, {layers} layers" not in done:
            with tempfile.TemporaryDirectory() as place:
                keep(f"taking over, {layers} layers", take_over(Path(place), layers))


def give_out(memory: Path, num_workers: int) -> dict[str, float]:
    """Seconds to start, and then per batch of 64 KiB of text."""
    reading.Worker = IdleWorker  # type: ignore[misc,assignment]
    text = "x" * BATCH_BYTES
    with join_cluster(None, num_workers):
        readers = IdleReaders(lambda: (None, None), num_workers)

        def give_documents() -> Iterator[Document]:
            number = num_given = 0
            while num_given < NUM_BATCHES:
                yield Document(str(number), text)
                number, num_given = number + 1, num_given + (not readers._opening)

        start_s = time.perf_counter()
        given = readers.read(
            give_documents(), memory, keep_text=True, on_read=lambda name, count: None
        )
        next(given)
        first_s = time.perf_counter()
        # Until all workers are there.
        while readers._opening:
            next(given)
        begun_s, num_left = time.perf_counter(), sum(1 for _ in given)
        took_s = time.perf_counter() - begun_s
        list(readers.stop())
    return {
        "first_s": round(first_s - start_s, 2),
        "all_started_s": round(begun_s - start_s, 2),
        "ms_per_batch": round(1e3 * took_s / max(1, num_left), 3),
        "batches": num_left,
    }


def take_over(place: Path, num_layers: int) -> dict[str, float]:
    """Seconds to take over a part that is as large as what is read at a time."""
    description = FolderDescription("x", tuple(range(num_layers)), HEADS, WIDTH)
    whole = MemoryFolder.create(place / "whole", description)
    entries = torch.randn(HEADS, ENTRIES, WIDTH)
    took_s = []
    for number in range(8):
        part = MemoryFolder.create(place / "whole" / "part", description)
        document = NewDocument(str(number), ENTRIES, ENTRIES, hash_text(""), "")
        part.append([document], dict.fromkeys(range(num_layers), (entries, entries)))
        start_s = time.perf_counter()
        whole.take_over(part.path)
        took_s.append(time.perf_counter() - start_s)
    return {
        "median_s": round(sorted(took_s)[len(took_s) // 2], 4),
        "most_s": round(max(took_s), 4),
        "mib": round(ENTRIES * description.bytes_per_entry / 2**20, 1),
    }


if __name__ == "__main__":
    main()
