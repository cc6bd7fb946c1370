"""The types that carry text: documents, and segments of documents side by side in rows."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Document:
    """A text that is read from its beginning to its end, with a memory of its own."""

    name: str
    text: str
    num_bytes: int = -1
    """Bytes of the raw text as it was read, before undecodable bytes were replaced; -1 counts
    `text` as UTF-8."""

    def __post_init__(self) -> None:
        """Count the bytes where the reader did not."""
        if self.num_bytes < 0:
            object.__setattr__(
                self, "num_bytes", len(self.text.encode("utf-8", errors="surrogatepass"))
            )


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

    def to(self, device: torch.device | str) -> SegmentBatch:
        """The batch with its (B, T) tensors on a device; what the clock needs stays on the CPU."""
        return SegmentBatch(
            self.tokens.to(device),
            self.targets.to(device),
            self.valid.to(device),
            self.doc_start,
            self.doc_id,
            self.position,
        )
