"""What a model read in a memory: documents, and the places and passages in them."""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from memorizing.huggingface.attaching.passage_room import Passage
from memorizing.huggingface.attaching.passages import CHUNK_LEN
from memorizing.huggingface.attaching.step import Finding
from memorizing.huggingface.sessions.stores import FolderStore, RamStore
from memorizing.memory.disk import StoredDocument

_LINE_END = re.compile(r"\r\n|\r|\n")


@dataclass(frozen=True)
class Source:
    """A passage that a model had in sight, or a place whose entries it retrieved."""

    document: str | None
    """Its name; None is the text itself, what it has behind its window."""
    first_line: int | None
    """Line of its first character that is not blank, from 1. Lines end with `\\n`, `\\r\\n` or
    `\\r`. None: it is not known where the document's tokens stand in its text."""
    last_line: int | None
    """Line of its last one."""
    weight: float
    """Of a passage, the share of the attention of the text's last tokens that went to its best
    chunk when it was found; of a place, its share of all attention to retrieved entries."""
    text: str
    """All of the passage; of a place, its token with what stands around it."""
    focus: tuple[int, int]
    """Characters of `text` that were found: the passage's best chunk, or the place's token."""
    since: int | None = None
    """Of a passage, tokens of the text that were read before it was in sight."""
    until: int | None = None
    """Of a passage, tokens that were read before others took its place; None stayed."""


class Sources:
    """Attention mass on entries and on the text's own memory, of all calls, layers, open heads."""

    def __init__(self, store: RamStore | FolderStore, tokenizer: Any = None) -> None:
        """Nothing yet."""
        self._store = store
        self._tokenizer = tokenizer
        self._documents: tuple[StoredDocument, ...] = ()
        self._per_entry = torch.zeros(0, dtype=torch.float64)
        self._gone: dict[str, float] = {}
        self.own_mass = 0.0
        self.passages: list[Source] = []
        """All that were in sight, in the order in which they came, the best of a time first."""
        self._in_sight: dict[tuple[str | None, int, int], int] = {}

    def add(self, layer: int, findings: Sequence[Finding], gates: Tensor) -> None:
        """Take what one layer retrieved; see `OnRetrieved`."""
        self._follow()
        for found in findings:
            if found.is_own:
                self.own_mass += float(found.shares.sum())
            else:
                mass = found.shares.flatten().double().cpu()
                self._per_entry.index_add_(0, found.entries.flatten().cpu(), mass)
        seen = [(found.passage, found.since) for found in findings if found.passage is not None]
        if seen:
            self._see([passage for passage, _ in seen], seen[0][1])

    def _see(self, passages: Sequence[Passage], since: int) -> None:
        """Note what is in sight from a token on; the first of a text ends what was before."""
        before = self._in_sight if since else {}
        self._in_sight = {}
        for passage in passages:
            key = (passage.document, passage.start, passage.end)
            if key not in before and key not in self._in_sight:
                self._in_sight[key] = len(self.passages)
                self.passages.append(self._quote(passage, since))
            elif key in before:
                self._in_sight[key] = before[key]
        for key in before.keys() - self._in_sight.keys():
            gone = before[key]
            self.passages[gone] = replace(self.passages[gone], until=since)

    def _quote(self, passage: Passage, since: int) -> Source:
        name, spans = passage.document, None
        if name is not None:
            spans = self._store.read_spans(name)
        if spans is None:
            # Without the tokens' characters, the text is what the tokens say, where they are known.
            decode = getattr(self._tokenizer, "decode", None)
            text = decode(passage.ids) if decode is not None and passage.kept is None else ""
            return Source(name, None, None, passage.score, text, (0, len(text)), since)
        assert name is not None
        text = self._store.read_text(name)
        start, end = _join_spans(spans[passage.start : passage.end], text)
        first = max(passage.start, passage.chunk)
        chunk = spans[first : min(passage.end, passage.chunk + CHUNK_LEN)]
        focus = _join_spans(chunk, text)
        lines = find_lines(text, start, end)
        focus = (focus[0] - start, focus[1] - start)
        return Source(name, *lines, passage.score, text[start:end], focus, since)

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

    def find_places(
        self, *, num_documents: int = 5, num_per_document: int = 2, num_characters: int = 60
    ) -> list[Source]:
        """The most used entries of the most used documents whose texts are kept, largest first.

        Places that overlap are shown once. Where passages are read, see `passages` instead.

        Args:
            num_documents: at most.
            num_per_document: at most.
            num_characters: of the text on both sides.

        Raises:
            MemoryFolderError: a file of the folder is damaged.
        """
        self._follow()
        total = sum(self.mass.values()) + self.own_mass
        names = [name for name, _ in self.list()[:num_documents]]
        found: list[Source] = []
        for document, mass in zip(self._documents, self._split(), strict=True):
            if document.name not in names or not self._store.has_text(document):
                continue
            spans = self._store.read_spans(document.name)
            if spans is None:
                continue
            text, tokens = self._store.read_text(document.name), self._store.list_places(document)
            for place in _choose_places(mass, num_per_document, num_characters // 4):
                token = int(tokens[place])
                start, end = _join_spans(spans[token : token + 1], text)
                first = max(0, start - num_characters)
                found.append(
                    Source(
                        document.name,
                        *find_lines(text, start, end),
                        float(mass[place]) / total,
                        text[first : end + num_characters],
                        (start - first, end - first),
                    )
                )
        return sorted(found, key=lambda source: -source.weight)


def _join_spans(spans: Tensor, text: str) -> tuple[int, int]:
    """First character of tokens and the one after their last, of (n, 2) spans; empty ones apart.

    Another may have written them.
    """
    filled = spans[spans[:, 1] > spans[:, 0]].clamp(0, len(text))
    return (int(filled[:, 0].min()), int(filled[:, 1].max())) if len(filled) else (0, 0)


def find_lines(text: str, start: int, end: int) -> tuple[int, int]:
    """Lines, from 1, of the first and the last character of a stretch that are not blank."""
    inner = text[start:end]
    if inner.strip():
        start += len(inner) - len(inner.lstrip())
        end -= len(inner) - len(inner.rstrip())
    ends = [one.end() for one in _LINE_END.finditer(text, 0, end)]
    return bisect_right(ends, start) + 1, bisect_right(ends, max(start, end - 1)) + 1


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
