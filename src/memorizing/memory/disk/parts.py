"""New segments: parts of others and of what was just read, put together without rounding again."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

import torch
from torch import Tensor

from memorizing.memory.disk.layout import Counts, SegmentLayout
from memorizing.memory.disk.manifest import StoredDocument
from memorizing.memory.disk.segment import SegmentFile


@dataclass(frozen=True)
class Part:
    """Documents, and where their entries, texts and characters are."""

    documents: tuple[StoredDocument, ...]
    """In the order of their entries."""
    get_tensor: Callable[[str], Tensor]
    """By the name it has in a segment."""


def take_part(
    segment: SegmentFile, documents: Sequence[StoredDocument], without: str | None = None
) -> Part:
    """All documents of a segment but one."""
    kept = (
        document
        for document in documents
        if document.segment == segment.record.file and document.name != without
    )
    return Part(tuple(kept), segment.get_tensor)


def number_documents(parts: Sequence[Part], file: str) -> tuple[Counts, tuple[StoredDocument, ...]]:
    """What a segment of these parts holds, and where its documents are in it."""
    documents = [document for part in parts for document in part.documents]
    entries = _lay_out([document.num_entries for document in documents])
    spans = _lay_out([_length(document.spans) for document in documents])
    texts = _lay_out([_length(document.text) for document in documents])
    numbered = tuple(
        replace(
            document,
            segment=file,
            first_entry=entries[place],
            spans=(spans[place], spans[place + 1]) if document.spans else None,
            text=(texts[place], texts[place + 1]) if document.text else None,
        )
        for place, document in enumerate(documents)
    )
    return Counts(entries[-1], spans[-1], texts[-1]), numbered


def iterate_content(parts: Sequence[Part], layout: SegmentLayout) -> Iterator[memoryview]:
    """The bytes of a segment of these parts, piece by piece; nothing large is copied."""
    yield memoryview(layout.header)
    for name, place in layout.places.items():
        tensors = [part.get_tensor(name) for part in parts]
        ranges = [_list_ranges(part.documents, name) for part in parts]
        # Entries of a head stand together.
        by_head = name.startswith("layers.")
        for head in range(place.shape[0] if by_head else 1):
            for tensor, chosen in zip(tensors, ranges, strict=True):
                lines = tensor[head] if by_head else tensor
                for start, stop in chosen:
                    yield view_bytes(lines[start:stop])


def view_bytes(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous tensor on the CPU."""
    return tensor.reshape(-1).view(torch.uint8).numpy().data


def _list_ranges(documents: Sequence[StoredDocument], name: str) -> list[tuple[int, int]]:
    """Lines of the documents in a tensor; neighbors are joined."""
    ranges: list[tuple[int, int]] = []
    for document in documents:
        if name == "texts":
            found = document.text
        elif name == "token_spans":
            found = document.spans
        else:
            found = (document.entries.start, document.entries.stop)
        if found is None or found[0] == found[1]:
            continue
        if ranges and ranges[-1][1] == found[0]:
            found = (ranges.pop()[0], found[1])
        ranges.append(found)
    return ranges


def _lay_out(lengths: Sequence[int]) -> list[int]:
    return list(accumulate(lengths, initial=0))


def _length(part: tuple[int, int] | None) -> int:
    return part[1] - part[0] if part else 0
