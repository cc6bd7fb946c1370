"""A memory that shards serve, as a session reads it: what a folder's store gives, asked for."""

from __future__ import annotations

import contextlib
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor

from memorizing.errors import ConfigError, MemoryFolderError
from memorizing.huggingface.attaching.memory_layer import OpenHeads
from memorizing.huggingface.attaching.memory_settings import MemorySettings
from memorizing.huggingface.attaching.passage_room import (
    Passage,
    Question,
    ReadEntries,
    Totals,
    list_special_ids,
)
from memorizing.huggingface.attaching.passages import Collection, Span, add_sums
from memorizing.knn import Neighbors
from memorizing.memory import Retrieved
from memorizing.memory.disk import FolderDescription, LayerEntries, NewDocument, StoredDocument
from memorizing.memory.retrieved import keep_best
from memorizing.ray.asking import Replica, Shards
from memorizing.ray.shard import LOW_BITS, Description, Opened, View

_OPEN_S = 600.0
"""Every shard loads, and may have to build an index."""


class ServedStore:
    """What was read, in shards; it is not changed here."""

    def __init__(
        self,
        shards: Shards,
        described: Description,
        open_heads: Callable[[], Mapping[int, OpenHeads]],
        chosen: Sequence[StoredDocument] | None,
    ) -> None:
        """Take shards that answer.

        Args:
            shards: of the memory.
            described: what they serve.
            open_heads: gives the heads that read now.
            chosen: documents that are searched; None is all.
        """
        self.shards = shards
        self.description: FolderDescription = described.folder
        self._described = described
        self._open_heads = open_heads
        self._chosen = None if chosen is None else frozenset(one.name for one in chosen)
        self.documents = described.documents if chosen is None else tuple(chosen)
        self._by_name = {one.name: one for one in described.documents}
        self._shard_of = {
            one.name: shard
            for shard, (first, last) in enumerate(pairwise(described.edges))
            for one in described.documents[first:last]
        }
        counts = [0] * len(shards.replicas)
        for document in self.documents:
            counts[self._shard_of[document.name]] += document.num_entries
        self.first_entries: list[int] = [0, *accumulate(counts)]
        """Per shard, the number of its first entry; then the number of all."""
        self._opened: list[Opened] = []

    @property
    def left_out(self) -> Mapping[int, int]:
        """Per shard, the rounds in which it did not answer."""
        return self.shards.left_out

    def find_document(self, name: str) -> StoredDocument | None:
        """The document of a name."""
        return self._by_name.get(name)

    def has_text(self, document: StoredDocument) -> bool:
        """See `FolderStore`."""
        return document.text is not None

    def read_text(self, name: str) -> str:
        """The kept text of a document.

        Raises:
            MemoryFolderError: its shard does not answer now.
        """
        return self._tell("read_text", name, name)

    def read_spans(self, name: str) -> Tensor | None:
        """See `FolderStore`; raises as `read_text`."""
        return self._tell("read_spans", name, name) if name in self._by_name else None

    def list_places(self, document: StoredDocument) -> Tensor:
        """See `FolderStore`; raises as `read_text`."""
        return self._tell("list_places", document.name, document)

    def _tell(self, method: str, name: str, argument: Any) -> Any:
        shard = self._shard_of[name]
        answers = self.shards.ask("tell", {shard: (method, argument)})
        if shard not in answers:
            raise MemoryFolderError(
                f"shard {shard} of {self.shards.address}, which has {name!r}, does not answer; "
                "try again later"
            )
        return answers[shard][0]

    def open_library(self, settings: MemorySettings, tokenizer: Any) -> ServedLibrary | None:
        """Open what is read, in all shards; see `FolderStore`.

        Raises:
            MemoryFolderError: as `FolderStore.open_library`, or a shard does not answer.
        """
        view = View(
            uuid.uuid4().hex,
            self._described.state,
            settings,
            dict(self._open_heads()),
            tokenizer,
            self._chosen,
        )
        self._opened = self.shards.open(view, None, _OPEN_S)
        if not (settings.finds_passages or settings.keep == "entries"):
            return None
        median = find_median(self.shards, self.first_entries[-1])
        self._opened = self.shards.open(view, median, _OPEN_S)
        return ServedLibrary(self, list_special_ids(tokenizer))

    def open_layers(
        self, devices: Mapping[int, torch.device], open_heads: Mapping[int, OpenHeads]
    ) -> dict[int, ServedMemory]:
        """See `FolderStore`; `open_library` is called before."""
        return {
            layer: ServedMemory(
                self.shards,
                layer,
                len(open_heads[layer].key_heads),
                self.description,
                [
                    [start + first for first in opened.first_entries[layer]]
                    for start, opened in zip(self.first_entries, self._opened, strict=False)
                ],
                self.first_entries[-1],
            )
            for layer in self.description.layers
            if layer in open_heads and open_heads[layer].is_any
        }

    def open_entries(self) -> NoReturn:
        """Entries, and tokens, are fetched with their passages."""
        self._refuse("read entry by entry")

    @contextlib.contextmanager
    def write(self, tokenizer: Any) -> Iterator[None]:
        """Nothing is written."""
        self._refuse("read into")
        yield

    def append(self, documents: Sequence[NewDocument], entries: LayerEntries) -> None:
        """Nothing is written."""
        self._refuse("read into")

    def forget(self, name: str) -> None:
        """Nothing is forgotten."""
        self._refuse("made to forget")

    def save(self, path: Path, dtype: str | None) -> None:
        """Nothing is copied."""
        self._refuse("copied")

    def _refuse(self, what: str) -> NoReturn:
        raise MemoryFolderError(
            f"{self.shards.address} is served, and cannot be {what} here; open its folder, where "
            "nobody serves it"
        )


@dataclass(frozen=True)
class ServedMemory:
    """Entries of one layer, in shards: as `FrozenMemory`."""

    shards: Shards
    layer: int
    num_heads: int
    description: FolderDescription
    firsts: list[list[int]]
    """Per shard, the first entries of its parts."""
    size: int

    @property
    def first_entries(self) -> list[int]:
        """Per part of what is retrieved, its first entry."""
        return [first for firsts in self.firsts for first in firsts]

    def search_exactly(self) -> NoReturn:
        """Shards search as they were opened to.

        Raises:
            ConfigError: always.
        """
        raise ConfigError(
            f"{self.shards.address} is served, and searched as it was opened; open its folder"
        )

    def retrieve(self, queries: Tensor, num_neighbors: int) -> tuple[Retrieved, ...]:
        """See `FrozenMemory.retrieve`, in one round; what is left out has found nothing."""
        asked = queries.detach().to("cpu", self.description.searched_dtype)
        arguments = {
            shard: (self.layer, asked, num_neighbors)
            for shard, firsts in enumerate(self.firsts)
            if firsts
        }
        answers = self.shards.ask("retrieve", arguments)
        parts: list[Retrieved] = []
        for shard, firsts in enumerate(self.firsts):
            if shard in answers:
                parts += answers[shard][0]
            else:
                parts += [self._find_nothing(asked)] * len(firsts)
        return tuple(move(part, queries.device) for part in keep_best(parts, num_neighbors))

    def _find_nothing(self, asked: Tensor) -> Retrieved:
        shape = (*asked.shape[:3], 1)
        lines = torch.zeros(shape, dtype=torch.int64)
        scores = torch.full(shape, -torch.inf, dtype=asked.dtype)
        stored = asked.new_zeros(1, asked.shape[3])
        neighbors = Neighbors(lines, scores, torch.zeros(shape, dtype=torch.bool))
        return Retrieved(neighbors, stored, stored, lines, lines, torch.zeros(()), torch.zeros(()))


def move(found: Retrieved, device: torch.device) -> Retrieved:
    """The same on a device."""
    if device.type == "cpu":
        return found
    neighbors = Neighbors(
        *(
            one.to(device)
            for one in (found.neighbors.slots, found.neighbors.scores, found.neighbors.valid)
        )
    )
    return replace(
        found,
        neighbors=neighbors,
        stored_keys=found.stored_keys.to(device),
        stored_values=found.stored_values.to(device),
        key_lines=found.key_lines.to(device),
        value_lines=found.value_lines.to(device),
    )


def find_median(shards: Shards, num_entries: int) -> float | None:
    """The median of the lengths of the values of all shards, exactly as `Tensor.median`.

    Of its bits, the upper half is found first, then the lower one.

    Raises:
        MemoryFolderError: a shard does not answer.
    """
    if not num_entries:
        return None
    rank, high = (num_entries - 1) // 2, None
    for _ in range(2):
        answers = shards.ask("count_lengths", dict.fromkeys(range(len(shards.replicas)), (high,)))
        if len(answers) < len(shards.replicas):
            raise MemoryFolderError(f"a shard of {shards.address} does not answer; open it again")
        below = torch.stack([counts for counts, _ in answers.values()]).sum(0).cumsum(0)
        place = int(torch.searchsorted(below, rank, right=True))
        rank -= int(below[place - 1]) if place else 0
        high, bits = (place, 0) if high is None else (high, high << LOW_BITS | place)
    return float(torch.tensor([bits], dtype=torch.int32).view(torch.float32))


class ServedLibrary:
    """Documents among which passages are found, in shards."""

    def __init__(self, store: ServedStore, special_ids: tuple[int, ...]) -> None:
        """Take a memory whose view every shard has opened."""
        self._store, self._shards = store, store.shards
        self.special_ids = special_ids
        self.names: Sequence[str] = [one.name for one in store.documents]
        self.num_entries: Sequence[int] = [one.num_entries for one in store.documents]

    @property
    def is_empty(self) -> bool:
        """See `Searched`."""
        return not self.num_entries

    def read_tokens(self, document: int) -> NoReturn:
        """Tokens are fetched with their passages."""
        self._store.open_entries()

    def read_ids(self) -> NoReturn:
        """Shards have them."""
        self._store.open_entries()

    def find_kept(self, document: int, numbers: Tensor) -> NoReturn:
        """Entries are fetched with their passages."""
        self._store.open_entries()

    def shelve(self, collection: Collection) -> ServedLibrary:
        """Itself: shards have the entries."""
        return self

    def ask(self, question: Question, settings: MemorySettings) -> ServedSearch:
        """See `Searched`. Settings are those of the view."""
        return ServedSearch(self._shards, self._store.first_entries, question)

    def fetch(self, spans: Sequence[Span]) -> list[Passage | None]:
        """See `Searched`; in one round."""
        firsts = self._store.first_entries
        asked: dict[int, list[int]] = {}
        for place, span in enumerate(spans):
            shard = next(s for s, last in enumerate(firsts[1:]) if span.start < last)
            asked.setdefault(shard, []).append(place)
        answers = self._shards.ask(
            "fetch",
            {
                shard: ([move_span(spans[place], -firsts[shard]) for place in places],)
                for shard, places in asked.items()
            },
        )
        passages: list[Passage | None] = [None] * len(spans)
        for shard, (found, _) in answers.items():
            for place, (passage, entries) in zip(asked[shard], found, strict=True):
                chunk, first = passage.entries, firsts[shard]
                passages[place] = replace(
                    passage,
                    entries=chunk and range(chunk.start + first, chunk.stop + first),
                    kept=give_again(entries) if entries else None,
                )
        return passages


def give_again(entries: list[Any]) -> ReadEntries:
    """What was fetched, as `Passage.kept`."""
    return lambda: iter(entries)


def move_span(span: Span, distance: int) -> Span:
    """The same in a collection that begins elsewhere. Its document is not known there."""
    return replace(
        span,
        start=span.start + distance,
        end=span.end + distance,
        chunk=span.chunk + distance,
    )


@dataclass
class ServedSearch:
    """See `Search`: a round for the words, one for the sums, one for the spans."""

    shards: Shards
    first_entries: list[int]
    question: Question
    number: str = field(default_factory=lambda: uuid.uuid4().hex)
    answered: dict[int, Replica] = field(default_factory=dict)
    """Per shard that answered so far, the replica that did."""

    def count_holding(self) -> tuple[Tensor, int]:
        """See `Search`."""
        asked = replace(
            self.question,
            queries={layer: one.cpu() for layer, one in self.question.queries.items()},
            places={layer: one.cpu() for layer, one in self.question.places.items()},
        )
        arguments = dict.fromkeys(range(len(self.shards.replicas)), (self.number, asked))
        answers = self.shards.ask("count_holding", arguments)
        self.answered = {shard: replica for shard, (_, replica) in answers.items()}
        holding = torch.zeros(self.question.words.num, dtype=torch.int64)
        for (counts, _), _ in answers.values():
            holding += counts
        return holding, sum(num_chunks for (_, num_chunks), _ in answers.values())

    def sum_up(self, weights: Tensor) -> Totals:
        """See `Search`."""
        arguments = dict.fromkeys(self.answered, (self.number, weights))
        answers = self.shards.ask("sum_up", arguments, self.answered)
        self.answered = {shard: replica for shard, (_, replica) in answers.items()}
        return add_sums([totals for totals, _ in answers.values()])

    def choose(self, totals: Totals, *, is_written: bool) -> list[Span]:
        """See `Search`."""
        arguments = dict.fromkeys(self.answered, (self.number, totals, is_written))
        answers = self.shards.ask("choose", arguments, self.answered)
        return [
            move_span(span, self.first_entries[shard])
            for shard, (spans, _) in answers.items()
            for span in spans
        ]
