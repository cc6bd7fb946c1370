"""A part of a memory that is served: documents of a folder, searched in a process of its own."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from memorizing.errors import MemoryFolderError
from memorizing.huggingface.attaching.finding import ShelfSearch
from memorizing.huggingface.attaching.memory_layer import OpenHeads
from memorizing.huggingface.attaching.memory_settings import MemorySettings
from memorizing.huggingface.attaching.passage_room import (
    Passage,
    Question,
    Totals,
    make_passage,
)
from memorizing.huggingface.attaching.passages import Collection, Span
from memorizing.huggingface.sessions.stores import FolderStore
from memorizing.index_settings import parse_index
from memorizing.memory import MemoryFolder, Retrieved
from memorizing.memory.disk import FolderDescription, StoredDocument
from memorizing.ray.wire import decode, encode

UNKNOWN = "this view is not known"
"""Answer of a shard that was restarted since a view of it was opened."""
LOW_BITS = 16
"""Bits of a length that are counted at a time, in a table of 65,536 numbers."""
_MOST_VIEWS = 64
"""That are open; of those that nobody closed, the oldest is forgotten."""
_MOST_SEARCHES = 64
"""That wait for their next step, likewise."""


@dataclass(frozen=True)
class View:
    """How a model reads a memory: what it asks all shards for."""

    number: str
    """Tells it from all others."""
    state: str
    """Of the memory; see `hash_state`."""
    settings: MemorySettings
    open_heads: dict[int, OpenHeads]
    """Per layer; see `OpenHeads`."""
    tokenizer: Any
    chosen: frozenset[str] | None
    """Names of the documents that are searched; None is all."""


@dataclass(frozen=True)
class Description:
    """What a shard knows of the memory that it is a part of."""

    folder: FolderDescription
    documents: tuple[StoredDocument, ...]
    """Of all shards."""
    edges: tuple[int, ...]
    """Shard s has the documents from edges[s] to edges[s + 1]."""
    num_replicas: int
    state: str


@dataclass(frozen=True)
class Opened:
    """What a view of a shard holds."""

    first_entries: dict[int, tuple[int, ...]]
    """Per layer and part of what is retrieved, its first entry, in the shard."""


def hash_state(folder: MemoryFolder) -> str:
    """Tells what a folder holds now from all else that it may hold."""
    parts = [segment.sha256 for segment in folder.contents.manifest.segments]
    return hashlib.sha256("".join(parts).encode()).hexdigest()[:16]


class Shard:
    """What runs in a process of its own. Nothing of it is written to disk."""

    def __init__(self, path: Path, shard: int, edges: tuple[int, ...], num_replicas: int) -> None:
        """Take documents of a folder.

        Raises:
            MemoryFolderError: it is not there: this machine has another disk; or it is damaged.
        """
        self._folder = MemoryFolder.open(path)
        self._documents = self._folder.documents[edges[shard] : edges[shard + 1]]
        self._edges, self._num_replicas = edges, num_replicas
        self._state = hash_state(self._folder)
        self._views: dict[str, OpenShard] = {}

    def describe(self) -> Description:
        """What whoever opens the memory has to know."""
        folder = self._folder
        return Description(
            folder.description, folder.documents, self._edges, self._num_replicas, self._state
        )

    def open(self, view: View, median: float | None) -> Opened:
        """Load what a view searches. May take minutes.

        Args:
            view: the same one may be opened again.
            median: of the lengths of values of all shards, where passages are found and it is
                known: what is longer than a share of it is no sink.

        Raises:
            MemoryFolderError: another state than that of the view, or what `open_library` refuses.
        """
        if view.state != self._state:
            raise MemoryFolderError(
                f"{self._folder.path} holds something else than when it was opened; open it again"
            )
        if view.number not in self._views:
            while len(self._views) >= _MOST_VIEWS:
                del self._views[next(iter(self._views))]
            self._views[view.number] = OpenShard(view, self._folder, self._documents)
        return self._views[view.number].prepare(median)

    def ask(self, view: str, method: str, arguments: bytes) -> bytes | str:
        """Call a method of an open view, and encode its answer; `UNKNOWN` where it is not open.

        Args:
            view: its number.
            method: of `OpenShard`.
            arguments: encoded.
        """
        opened = self._views.get(view)
        if opened is None:
            return UNKNOWN
        return encode(getattr(opened, method)(*decode(arguments)))


class OpenShard:
    """One view of a shard."""

    def __init__(
        self, view: View, folder: MemoryFolder, documents: Sequence[StoredDocument]
    ) -> None:
        """Open what the view reads of these documents."""
        self._settings = view.settings
        chosen = [one for one in documents if view.chosen is None or one.name in view.chosen]
        index = parse_index(view.settings.index)
        self._store = FolderStore(folder.path, folder, folder.description, index, chosen)
        cpu = dict.fromkeys(view.open_heads, torch.device("cpu"))
        self._layers = self._store.open_layers(cpu, view.open_heads)
        self._library = self._store.open_library(view.settings, view.tokenizer)
        self._collection = Collection((), {})
        self._searches: dict[str, ShelfSearch] = {}

    def prepare(self, median: float | None) -> Opened:
        """Load everything, and say what is there."""
        for memory in self._layers.values():
            memory.prepare()
        if self._library is not None:
            lengths, read_ids = tuple(self._library.num_entries), self._library.read_ids
            special_ids = self._library.special_ids
            self._collection = Collection(lengths, self._layers, read_ids, median, special_ids)
            if median is not None:
                self._collection.ids  # noqa: B018  texts are cut into tokens before anyone asks
        firsts = {layer: memory.first_entries for layer, memory in self._layers.items()}
        return Opened(firsts)

    def count_lengths(self, high: int | None) -> Tensor:
        """Of the lengths of values, as bits of fp32, how many there are.

        Args:
            high: of those with these upper bits, counted by their lower ones; None counts all by
                their upper ones. Numbers that are not negative are in the order of their bits.
        """
        bits = self._collection.lengths.view(torch.int32).long()
        if high is not None:
            bits = bits[bits >> LOW_BITS == high] & (2**LOW_BITS - 1)
            return bits.bincount(minlength=2**LOW_BITS)
        return (bits >> LOW_BITS).bincount(minlength=2**LOW_BITS)

    def retrieve(self, layer: int, queries: Tensor, num_neighbors: int) -> tuple[Retrieved, ...]:
        """See `FrozenMemory.retrieve`; with nothing but the entries that were found."""
        return tuple(map(pack, self._layers[layer].retrieve(queries, num_neighbors)))

    def count_holding(self, number: str, question: Question) -> tuple[Tensor, int]:
        """See `Search.count_holding`; the search waits under its number for what follows."""
        search = ShelfSearch(self._collection, question, self._settings)
        while len(self._searches) >= _MOST_SEARCHES:
            del self._searches[next(iter(self._searches))]
        self._searches[number] = search
        return search.count_holding()

    def sum_up(self, number: str, weights: Tensor) -> Totals:
        """See `Search.sum_up`; of nothing where the search does not wait any more."""
        search = self._searches.get(number)
        return {} if search is None else search.sum_up(weights)

    def choose(self, number: str, totals: Totals, is_written: bool) -> list[Span]:
        """See `Search.choose`; none where the search does not wait any more."""
        search = self._searches.pop(number, None)
        return [] if search is None else search.choose(totals, is_written=is_written)

    def fetch(self, spans: Sequence[Span]) -> list[tuple[Passage, list[Any]]]:
        """What stands in spans, and the entries of all layers that are kept of it."""
        passages = [make_passage(span, self._collection, self._library) for span in spans]
        return [
            (replace(one, kept=None), [] if one.kept is None else list(one.kept()))
            for one in passages
        ]

    def tell(self, method: str, argument: Any) -> Any:
        """What the store says of a document; see `FolderStore`."""
        return getattr(self._store, method)(argument)


def pack(found: Retrieved) -> Retrieved:
    """The same with a copy of what was found in the place of all that is stored."""
    lines, places = found.key_lines.unique(return_inverse=True)
    return replace(
        found,
        stored_keys=found.stored_keys[lines],
        stored_values=found.stored_values[lines],
        key_lines=places,
        value_lines=places,
        num_changes=torch.zeros(()),
        num_changes_then=torch.zeros(()),
    )
