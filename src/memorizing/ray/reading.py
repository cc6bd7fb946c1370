"""Documents read by many processes, each into folders of its own, which one memory takes over.

A batch of documents is read by one worker, into a new memory beside the segments of the one that is
read into; when all of it is there, it is taken over. What a worker that dies has not handed over is
read again by another. So every document is read whole once, and at every moment the manifest names
what is whole.
"""

from __future__ import annotations

import itertools
import threading
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from memorizing.data import Document
from memorizing.errors import ConfigError, MemorizingError, MemoryFolderError, RankError
from memorizing.huggingface.learning.adapter import load_adapter
from memorizing.huggingface.loading import load_pretrained
from memorizing.huggingface.sessions.opening import open_memory
from memorizing.huggingface.sessions.reading import OnRead
from memorizing.memory.disk import MemoryFolder
from memorizing.ray.cluster import Head, find_head, get, join_cluster
from memorizing.storage.files import name_temporary

Load = Callable[[], tuple[Any, Any]]
"""Gives a model and its tokenizer, on whatever machine."""

_LEAST_BATCH, _LARGEST_BATCH = 2**12, 2**16
"""Bytes of text: some 1,000 and 20,000 tokens."""
_SHARES = 4
"""Batches that each worker reads, so that all end at about the same time."""
_MOST_DEATHS = 3
"""Of workers, over one batch, or one after another before any has read."""
_NAMES_SHOWN = 3
_LOOK_S = 1.0
"""How often it is looked whether the cluster is still there."""
_STOP_S = 120.0
"""How long a worker may take to end a segment of a document, and write what is whole."""


def load_reader(
    name: str, dtype: str, device: str, adapter: Path | None, settings: dict[str, Any]
) -> tuple[Any, Any]:
    """A model as another process has it, with its tokenizer; see `load_pretrained`.

    Args:
        name: of the model.
        dtype: of its weights, as torch names it.
        device: where it computes.
        adapter: a folder of one, or None.
        settings: which `load_adapter` is given.

    Raises:
        ConfigError: there is no such model or adapter on this machine.
    """
    model, tokenizer = load_pretrained(name, dtype=getattr(torch, dtype), device=device)
    if adapter is not None:
        load_adapter(model, adapter, **settings)
    return model, tokenizer


class _StoppedError(Exception):
    """Reading ends here."""


@dataclass
class Batch:
    """Documents that one worker reads at a time."""

    documents: list[Document]
    place: Path
    """Where they are read into; there is nothing yet."""
    num_deaths: int = 0
    """Of workers that read it."""


@dataclass(frozen=True)
class Outcome:
    """What a worker did with a batch."""

    num_tokens: dict[str, int]
    """Of the documents that were read whole, by name."""
    error: MemorizingError | None
    """Why it read no more."""


class Worker:
    """What runs in a process of its own: it reads, and can be told to stop."""

    def __init__(self) -> None:
        """Read nothing yet."""
        self._is_stopped = threading.Event()

    def open(self, load: Load, memory: Path, keep_text: bool) -> None:
        """Load the model, and let it read as a memory says.

        Raises:
            ConfigError: the memory is not there: this machine has another disk.
            MemoryFolderError: the model is another one than that of the memory.
        """
        if not memory.is_dir():
            raise ConfigError(
                f"a worker does not see {memory}; all machines that read must have the folder of "
                "the memory at the same place"
            )
        self._model, self._tokenizer = load()
        open_memory(self._model, memory)
        description = MemoryFolder.open(memory).description
        self._options = {
            "keep_text": keep_text,
            "dtype": description.dtype,
            "fingerprint": description.settings["fingerprint"],
        }

    def read(self, documents: Sequence[Document], place: Path) -> Outcome:
        """Read documents into a new folder, until told to stop."""
        session = open_memory(self._model, place, **self._options)
        error = None
        try:
            session.read(self._tokenizer, documents, progress=self._check)
        except _StoppedError:
            pass
        except MemorizingError as caught:
            error = caught
        return Outcome({one.name: one.num_tokens for one in session.documents}, error)

    def _check(self, name: str, num_tokens: int) -> None:
        if self._is_stopped.is_set():
            raise _StoppedError

    def stop(self) -> None:
        """End the reading after this segment."""
        self._is_stopped.set()


class RayReaders:
    """Workers of a Ray cluster that read; for one call of `MemorySession.read`."""

    def __init__(
        self,
        load: Load,
        num_workers: int,
        address: str | None = None,
        *,
        num_gpus: float = 0,
        num_bytes: int | None = None,
    ) -> None:
        """Start nothing yet.

        Args:
            load: of the model, on every machine.
            num_workers: processes.
            address: see `join_cluster`.
            num_gpus: of each process.
            num_bytes: of all texts, where that is known.

        Raises:
            ConfigError: no worker.
        """
        if num_workers < 1:
            raise ConfigError(f"num_workers is {num_workers}; allowed: 1 or more")
        self._load, self._num_workers, self._address = load, num_workers, address
        self._num_gpus = num_gpus
        self.batch_bytes = _LARGEST_BATCH
        """Of text, that a worker reads at a time; a document is not divided."""
        if num_bytes is not None:
            share = num_bytes // (_SHARES * num_workers)
            self.batch_bytes = min(_LARGEST_BATCH, max(_LEAST_BATCH, share))
        self.num_deaths = 0
        """Workers that died."""
        self._stack = ExitStack()
        self._head: Head | None = None
        self._idle: list[Any] = []
        self._opening: dict[Any, Any] = {}
        self._reading: dict[Any, tuple[Any, Batch]] = {}
        self._again: deque[Batch] = deque()
        """Batches that are to be read next."""
        self._deaths_in_opening = 0

    def read(
        self, documents: Iterator[Document], memory: Path, *, keep_text: bool, on_read: OnRead
    ) -> Iterator[Path]:
        """See `Readers`.

        Raises:
            ConfigError: there is no such cluster, or no model on a machine of it.
            RankError: workers die again and again.
        """
        memory = memory.resolve()
        self._ray = self._stack.enter_context(join_cluster(self._address, self._num_workers))
        self._head = find_head(self._ray)
        parts = self._stack.enter_context(name_temporary(memory))
        parts.mkdir()
        self._stack.callback(self._kill)
        batches = self._divide(documents, parts)
        for _ in range(self._num_workers):
            self._start(memory, keep_text)
        while self._has_more(batches) or self._reading:
            while self._idle and self._has_more(batches):
                worker, batch = self._idle.pop(), self._again.popleft()
                ref = worker.read.remote(batch.documents, batch.place)
                self._reading[ref] = worker, batch
            self._head.check()
            for ref in self._ray.wait([*self._reading, *self._opening], timeout=_LOOK_S)[0]:
                worker, batch = self._reading.get(ref) or (self._opening[ref], None)
                try:
                    outcome = get(ref)
                except self._ray.exceptions.RayTaskError:
                    raise
                except self._ray.exceptions.RayError as error:
                    self._note_death(batch, error)
                    self._start(memory, keep_text)
                else:
                    self._idle.append(worker)
                    if batch is not None:
                        yield from self._hand_over(batch, outcome, on_read)
                # Only now: an interrupt may come at any time.
                self._reading.pop(ref, None)
                self._opening.pop(ref, None)

    @staticmethod
    def _hand_over(batch: Batch, outcome: Outcome, on_read: OnRead) -> Iterator[Path]:
        for name, num_tokens in outcome.num_tokens.items():
            on_read(name, num_tokens)
        if outcome.num_tokens:
            yield batch.place
        if outcome.error is not None:
            raise outcome.error

    def stop(self) -> Iterator[Path]:
        """See `Readers`."""
        with self._stack:
            if self._head is not None and self._head.is_lost:
                return
            for worker, _ in self._reading.values():
                worker.stop.remote()
            refs = list(self._reading)
            done = self._ray.wait(refs, num_returns=len(refs), timeout=_STOP_S)[0] if refs else ()
            for ref in done:
                place = self._reading[ref][1].place
                # What went wrong first is told already; and this may have been taken over just now.
                with suppress(self._ray.exceptions.RayError, MemoryFolderError):
                    if get(ref).num_tokens and MemoryFolder.open(place).documents:
                        yield place

    def _has_more(self, batches: Iterator[Batch]) -> bool:
        if not self._again:
            self._again.extend(itertools.islice(batches, 1))
        return bool(self._again)

    def _divide(self, documents: Iterator[Document], parts: Path) -> Iterator[Batch]:
        """Batches, whose documents are loaded when it is their turn."""
        number, waiting, num_bytes = 0, [], 0
        for document in documents:
            waiting.append(document)
            num_bytes += len(document.text)
            if num_bytes >= self.batch_bytes:
                yield Batch(waiting, parts / str(number))
                number, waiting, num_bytes = number + 1, [], 0
        if waiting:
            yield Batch(waiting, parts / str(number))

    def _start(self, memory: Path, keep_text: bool) -> None:
        """Start a worker, as soon as a machine has room for it."""
        nodes = [node["Resources"].get("CPU", 0.0) for node in self._ray.nodes() if node["Alive"]]
        num_cpus = max(1, int(min([*filter(None, nodes), sum(nodes) // self._num_workers])))
        worker = (
            self._ray.remote(Worker)
            .options(
                num_cpus=num_cpus,
                num_gpus=self._num_gpus,
                max_concurrency=2,
                scheduling_strategy="SPREAD",
            )
            .remote()
        )
        self._opening[worker.open.remote(self._load, memory, keep_text)] = worker

    def _note_death(self, batch: Batch | None, error: Exception) -> None:
        """Let the batch of a worker that died be read again."""
        self.num_deaths += 1
        if batch is None:
            self._deaths_in_opening += 1
            if self._deaths_in_opening >= _MOST_DEATHS and not (self._idle or self._reading):
                raise RankError(
                    f"{self._deaths_in_opening} workers died before they read anything ({error}); "
                    "perhaps there is no room for so many models: use fewer workers"
                ) from error
            return
        names = ", ".join(document.name for document in batch.documents[:_NAMES_SHOWN])
        names += ", ..." if len(batch.documents) > _NAMES_SHOWN else ""
        batch.num_deaths += 1
        if batch.num_deaths >= _MOST_DEATHS:
            raise RankError(
                f"{batch.num_deaths} workers died, one after another, while they read {names} "
                f"({error}); perhaps there is too little memory: use fewer workers, or leave these "
                "documents out"
            ) from error
        warnings.warn(
            f"a worker died while it read {names}; another one reads them again", stacklevel=2
        )
        batch.place = batch.place.with_name(f"{batch.place.name}-again")
        self._again.append(batch)

    def _kill(self) -> None:
        """End all workers. What they still write is removed with their folders."""
        assert self._head is not None
        if self._head.is_lost:
            return
        for worker in [
            *self._idle,
            *self._opening.values(),
            *(w for w, _ in self._reading.values()),
        ]:
            self._ray.kill(worker)
