"""Which entries of a memory a model read, and the text around the most used ones."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from memorizing.huggingface.attaching.attachment import get_attachment
from memorizing.memory.disk import MemoryFolder, TextAround


@dataclass(frozen=True)
class Snippet:
    """A place in a document that was read."""

    document: str
    share: float
    """Of all attention to retrieved entries."""
    text: TextAround


class UsedEntries:
    """Attention mass on every entry that was read, of all calls, layers and open heads."""

    def __init__(self) -> None:
        """Nothing yet."""
        self._mass = torch.zeros(0, dtype=torch.float64)
        self._total = 0.0

    def add(self, layer: int, weights: Sequence[Tensor], entries: Sequence[Tensor | None]) -> None:
        """Take what one layer retrieved; as `Sources.add`."""
        for weight, entry in zip(weights, entries, strict=True):
            mass = weight.flatten().double().cpu()
            self._total += float(mass.sum())
            if entry is None or not mass.numel():
                continue
            numbers = entry.flatten().cpu()
            missing = int(numbers.max()) + 1 - len(self._mass)
            if missing > 0:
                self._mass = torch.cat([self._mass, self._mass.new_zeros(missing)])
            self._mass.index_add_(0, numbers, mass)

    def find_snippets(
        self,
        folder: MemoryFolder,
        documents: Collection[str],
        *,
        num_per_document: int = 2,
        num_characters: int = 60,
    ) -> dict[str, list[Snippet]]:
        """The most used places of documents whose texts were kept, most used first.

        Places that overlap are shown once.

        Args:
            folder: that was read, in the state in which it was.
            documents: their names.
            num_per_document: at most.
            num_characters: on both sides.

        Raises:
            MemoryFolderError: a file of the folder is damaged.
        """
        found: dict[str, list[Snippet]] = {}
        first = 0
        for document in folder.documents:
            mass = self._mass[first : first + document.num_entries]
            first += document.num_entries
            is_kept = document.text is not None and document.spans is not None
            if document.name not in documents or not is_kept:
                continue
            for place in _choose_places(mass, num_per_document, num_characters // 4):
                number = first - document.num_entries + place
                snippet = Snippet(
                    document.name,
                    float(mass[place]) / self._total,
                    folder.contents.read_around(number, num_characters),
                )
                found.setdefault(document.name, []).append(snippet)
        return found


@contextmanager
def watch_entries(model: Any) -> Iterator[UsedEntries]:
    """Collect which entries the calls inside retrieve, besides what `MemorySession.record` does.

    Raises:
        ConfigError: the model has no memory.
    """
    attachment = get_attachment(model)
    others = attachment.on_retrieved
    used = UsedEntries()

    def tell(layer: int, weights: Sequence[Tensor], entries: Sequence[Tensor | None]) -> None:
        used.add(layer, weights, entries)
        if others is not None:
            others(layer, weights, entries)

    attachment.on_retrieved = tell
    try:
        yield used
    finally:
        attachment.on_retrieved = others


def _choose_places(mass: Tensor, num_places: int, distance: int) -> list[int]:
    """The largest, no two of them nearer than `distance` tokens."""
    chosen: list[int] = []
    order = mass.argsort(descending=True)[: num_places * (2 * distance + 1)]
    for place in order.tolist():
        if len(chosen) == num_places or not float(mass[place]) > 0:
            break
        if all(abs(place - other) >= distance for other in chosen):
            chosen.append(place)
    return chosen
