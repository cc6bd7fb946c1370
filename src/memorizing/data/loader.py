"""Documents read side by side in rows, one segment a step."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from memorizing.data.text import shuffle_names
from memorizing.data.tokenized import TokenizedDocument
from memorizing.errors import CheckpointError, CorpusError

_NO_DOCUMENT = -1


@dataclass(frozen=True)
class SegmentBatch:
    """One segment of one document in every row. B rows, T = segment_len.

    A row's segment starts at a multiple of segment_len in its document. The tail of a document is
    padded on the right. `tokens[b, i]` predicts `targets[b, i]`; the first input token of a
    document is the tokenizer's start token, so every token of a document is a target exactly once.
    """

    tokens: Tensor
    """(B, T) int64, on the CPU."""
    targets: Tensor
    """(B, T) int64; arbitrary where not valid."""
    valid: Tensor
    """(B, T) bool; False on padding."""
    doc_start: Tensor
    """(B,) bool: this segment is its document's first."""
    doc_id: Tensor
    """(B,) int64: index of the document in the loader's list; -1: nothing left to read."""
    position: Tensor
    """(B,) int64: position in its document of the row's first token."""

    @property
    def num_targets(self) -> int:
        """Tokens that count in the loss."""
        return int(self.valid.sum())

    def take_rows(self, rows: range) -> SegmentBatch:
        """The batch of these rows only, one after another, by reference."""
        parts = {name: tensor[rows.start : rows.stop] for name, tensor in vars(self).items()}
        return SegmentBatch(**parts)

    def to(self, device: torch.device | str) -> SegmentBatch:
        """The batch with its (B, T) tensors on a device; what the clock needs stays on the CPU."""
        moved = {name: getattr(self, name).to(device) for name in ("tokens", "targets", "valid")}
        return dataclasses.replace(self, **moved)


class RowLoader(Iterator[SegmentBatch], ABC):
    """Gives the rows of one step after the other, and goes on exactly where it was.

    Attributes:
        documents: what is read.
        num_rows: B of every batch.
        segment_len: the most targets of a row.
        start_token: precedes every text.
        seed: of what is drawn.
    """

    documents: Sequence[TokenizedDocument]
    num_rows: int
    segment_len: int
    start_token: int
    seed: int | None

    @property
    @abstractmethod
    def epoch(self) -> int:
        """How often the documents were read, from 0."""

    @property
    @abstractmethod
    def starts_document(self) -> bool:
        """Whether some row of the next batch has nothing to do with the one before."""

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """Where the reading is, as plain values that JSON holds; with those of `describe`."""

    @abstractmethod
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue exactly where `state` was taken.

        Raises:
            CorpusError, CheckpointError: see `check_state`; or it was altered.
        """

    @property
    def num_targets(self) -> int:
        """Tokens of all documents, each a target once an epoch."""
        return sum(len(document.tokens) for document in self.documents)

    def describe(self) -> dict[str, Any]:
        """What must be the same where a reading goes on."""
        names, content = self._fingerprints
        return {
            "documents": names,
            "content": content,
            "num_rows": self.num_rows,
            "segment_len": self.segment_len,
            "seed": self.seed,
        }

    def check_state(self, state: dict[str, Any]) -> None:
        """Refuse to go on with other documents, or in another way.

        What was saved before contents were compared is compared by names and lengths.

        Raises:
            CorpusError: it was taken with other documents, or the same with other text.
            CheckpointError: with other rows, segments or seed, or in another way.
        """
        own = self.describe()
        if missing := self.state_dict().keys() - state.keys() - {"content"}:
            raise CheckpointError(
                f"loader state lacks {', '.join(sorted(missing))}; it is truncated or of another "
                "version"
            )
        for key, what in (
            ("documents", "other documents (names or numbers of tokens)"),
            ("content", "documents of the same names and lengths, but of other text"),
        ):
            if state.get(key, own[key]) != own[key]:
                raise CorpusError(
                    f"the run was started with {what}; resume with the same corpus and tokenizer, "
                    "or start a new run"
                )
        for key in own:
            if key not in ("documents", "content") and own[key] != state[key]:
                raise CheckpointError(
                    f"loader state has {key} = {state[key]!r}, this loader {own[key]!r}; "
                    "resume with the same settings, or start a new run"
                )

    def check_documents(self) -> None:
        """Refuse documents that cannot be read.

        Raises:
            CorpusError: there are no documents, or one has no tokens.
        """
        if not self.documents:
            raise CorpusError(
                "there are no documents to read; too much is held out, or "
                "data.min_document_tokens is too large"
            )
        for document in self.documents:
            if not len(document.tokens):
                raise CorpusError(f"document {document.name!r} has no tokens; leave it out")

    @functools.cached_property
    def _fingerprints(self) -> tuple[str, str]:
        return hash_documents(self.documents)


class SegmentLoader(RowLoader):
    """Reads documents in B rows, T = segment_len tokens a step.

    Every row reads one document from its first token to its last; in the step after, it takes the
    next document that no row has read yet (`doc_start` is True). Rows take documents in the order
    of their row number. The tail of a document is padded and masked (`valid`).

    `repeat=True` goes on with the next epoch, in a new order, without waiting for the other rows
    and never ends; `repeat=False` reads each document once: rows with nothing left have doc_id -1
    and no valid target, and the iteration ends when all have.
    """

    def __init__(
        self,
        documents: Sequence[TokenizedDocument],
        num_rows: int,
        segment_len: int,
        start_token: int,
        seed: int | None = None,
        repeat: bool = False,
    ) -> None:
        """Take the documents; `seed` None reads them in the order given.

        Raises:
            CorpusError: there are no documents, or one has no tokens.
        """
        self.documents = documents
        self.check_documents()
        if num_rows < 1 or segment_len < 1:
            raise ValueError(
                f"num_rows is {num_rows} and segment_len {segment_len}; both must be 1 or more"
            )
        self.num_rows = num_rows
        self.segment_len = segment_len
        self.start_token = start_token
        self.seed = seed
        self.repeat = repeat
        self._epoch = 0
        self._taken = 0
        self._order = self._order_of(0)
        self._rows = [(_NO_DOCUMENT, 0)] * num_rows
        """Per row its document and the position in it of the next segment."""

    @property
    def num_segments(self) -> int:
        """Segments of one epoch over all rows, tails included."""
        return sum(-(-len(document.tokens) // self.segment_len) for document in self.documents)

    @property
    def epoch(self) -> int:
        """The epoch, from 0, of the document that was taken last."""
        return self._epoch

    @property
    def starts_document(self) -> bool:
        """Whether a row has read its document to the end: the next batch begins another there."""
        return any(self._is_finished(row) for row in self._rows)

    def __next__(self) -> SegmentBatch:
        """The next segment of every row."""
        rows = [self._take() if self._is_finished(row) else row for row in self._rows]
        if all(index == _NO_DOCUMENT for index, _ in rows):
            raise StopIteration
        shape = (self.num_rows, self.segment_len)
        tokens = np.full(shape, self.start_token, dtype=np.int64)
        targets = np.full(shape, self.start_token, dtype=np.int64)
        valid = np.zeros(shape, dtype=bool)
        for row, (index, position) in enumerate(rows):
            if index == _NO_DOCUMENT:
                continue
            ids = self.documents[index].tokens
            target = ids[position : position + self.segment_len]
            length = len(target)
            targets[row, :length] = target
            valid[row, :length] = True
            if position:
                tokens[row, :length] = ids[position - 1 : position - 1 + length]
            else:
                tokens[row, 1:length] = target[:-1]
        batch = SegmentBatch(
            tokens=torch.from_numpy(tokens),
            targets=torch.from_numpy(targets),
            valid=torch.from_numpy(valid),
            doc_start=torch.tensor(
                [index != _NO_DOCUMENT and position == 0 for index, position in rows]
            ),
            doc_id=torch.tensor([index for index, _ in rows]),
            position=torch.tensor([position for _, position in rows]),
        )
        self._rows = [(i, p if i == _NO_DOCUMENT else p + self.segment_len) for i, p in rows]
        return batch

    def state_dict(self) -> dict[str, Any]:
        """See `RowLoader`."""
        return {
            **self.describe(),
            "epoch": self._epoch,
            "taken": self._taken,
            "rows": [list(row) for row in self._rows],
        }

    def describe(self) -> dict[str, Any]:
        """See `RowLoader`."""
        return {**super().describe(), "repeat": self.repeat}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See `RowLoader`."""
        self.check_state(state)
        try:
            epoch, taken = int(state["epoch"]), int(state["taken"])
            rows = [(int(index), int(position)) for index, position in state["rows"]]
        except (TypeError, ValueError, OverflowError) as error:
            raise CheckpointError(f"loader state is damaged ({error}); it was altered") from error
        last = len(self.documents) - 1
        if (
            len(rows) != self.num_rows
            or not 0 <= taken <= len(self.documents)
            or not all(_NO_DOCUMENT <= index <= last and position >= 0 for index, position in rows)
        ):
            raise CheckpointError("loader state names places that no document has; it was altered")
        self._epoch, self._taken, self._rows = epoch, taken, rows
        self._order = self._order_of(epoch)

    def _is_finished(self, row: tuple[int, int]) -> bool:
        index, position = row
        return index == _NO_DOCUMENT or position >= len(self.documents[index].tokens)

    def _take(self) -> tuple[int, int]:
        if self._taken == len(self._order):
            if not self.repeat:
                return _NO_DOCUMENT, 0
            self._epoch += 1
            self._taken = 0
            self._order = self._order_of(self._epoch)
        index = self._order[self._taken]
        self._taken += 1
        return index, 0

    def _order_of(self, epoch: int) -> list[int]:
        indices = range(len(self.documents))
        if self.seed is None:
            return list(indices)
        return [int(name) for name in shuffle_names(map(str, indices), f"{self.seed}/{epoch}")]


def hash_documents(documents: Sequence[TokenizedDocument]) -> tuple[str, str]:
    """SHA-256 of all names and lengths, and of all tokens."""
    names, content = hashlib.sha256(), hashlib.sha256()
    for document in documents:
        line = f"{document.name}\0{len(document.tokens)}\0"
        names.update(line.encode("utf-8", errors="surrogatepass"))
        content.update(np.ascontiguousarray(document.tokens, dtype="<i4").data)
    return names.hexdigest(), content.hexdigest()
