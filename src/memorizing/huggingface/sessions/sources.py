"""Which entries of a memory a model read: their documents, and the text around the most used."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from memorizing.huggingface.attaching.step import Finding
from memorizing.huggingface.sessions.stores import FolderStore, RamStore
from memorizing.memory.disk import StoredDocument, TextAround


@dataclass(frozen=True)
class Snippet:
    """A place in a document that was read."""

    document: str
    share: float
    """Of all attention to retrieved entries."""
    text: TextAround


class Sources:
    """Attention mass on entries and on the text's own memory, of all calls, layers, open heads."""

    def __init__(self, store: RamStore | FolderStore) -> None:
        """Nothing yet."""
        self._store = store
        self._documents: tuple[StoredDocument, ...] = ()
        self._per_entry = torch.zeros(0, dtype=torch.float64)
        self._gone: dict[str, float] = {}
        self.own_mass = 0.0

    def add(self, layer: int, findings: Sequence[Finding], gates: Tensor) -> None:
        """Take what one layer retrieved; see `OnRetrieved`."""
        self._follow()
        for found in findings:
            if found.is_own:
                self.own_mass += float(found.shares.sum())
            else:
                mass = found.shares.flatten().double().cpu()
                self._per_entry.index_add_(0, found.entries.flatten().cpu(), mass)

    def _follow(self) -> None:
        """Number entries as the store does now; what was forgotten keeps its sum."""
        if self._documents is self._store.documents:
            return
        before = zip(self._documents, self._split(), strict=True)
        held = {(document.name, document.sha256): mass for document, mass in before}
        self._documents = self._store.documents
        parts = [
            held.pop((one.name, one.sha256), torch.zeros(one.num_entries, dtype=torch.float64))
            for one in self._documents
        ]
        self._per_entry = torch.cat([self._per_entry[:0], *parts])
        for (name, _), mass in held.items():
            self._gone[name] = self._gone.get(name, 0.0) + float(mass.sum())

    def _split(self) -> tuple[Tensor, ...]:
        return self._per_entry.split([document.num_entries for document in self._documents])

    @property
    def mass(self) -> dict[str, float]:
        """Per document that was read, the mass on its entries."""
        sums = dict(self._gone)
        for document, mass in zip(self._documents, self._split(), strict=True):
            if float(mass.sum()):
                sums[document.name] = sums.get(document.name, 0.0) + float(mass.sum())
        return sums

    def list(self) -> list[tuple[str, float]]:
        """Documents with their share of all attention to retrieved entries, largest first."""
        sums = self.mass
        total = sum(sums.values()) + self.own_mass
        shares = [(name, mass / total) for name, mass in sums.items() if total]
        return sorted(shares, key=lambda pair: -pair[1])

    def find_snippets(
        self,
        documents: Collection[str],
        *,
        num_per_document: int = 2,
        num_characters: int = 60,
    ) -> dict[str, list[Snippet]]:
        """The most used places of documents whose texts a folder keeps, most used first.

        Places that overlap are shown once.

        Args:
            documents: their names.
            num_per_document: at most.
            num_characters: on both sides.

        Raises:
            MemoryFolderError: a file of the folder is damaged.
        """
        self._follow()
        total = sum(self.mass.values()) + self.own_mass
        found: dict[str, list[Snippet]] = {}
        first = 0
        for document, mass in zip(self._documents, self._split(), strict=True):
            if document.name in documents and document.text and document.spans:
                assert isinstance(self._store, FolderStore)
                places = _choose_places(mass, num_per_document, num_characters // 4)
                snippets = [
                    Snippet(
                        document.name,
                        float(mass[place]) / total,
                        self._store.read_around(first + place, num_characters),
                    )
                    for place in places
                ]
                if snippets:
                    found[document.name] = snippets
            first += document.num_entries
        return found


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
