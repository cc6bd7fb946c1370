"""The room in which all layers read passages: between the sinks and the local window.

A text that has room for passages begins so many positions later. In front of its tokens stand, best
one last, the passages that were found, read again behind a start token: what the model makes of its
text is what it makes of `start token, passages, text` as one text, as far as its window goes. Where
a text goes on behind its window, passages stand right before what the window shows, in the place of
what has left it: at the beginning of the text they would be as far away as that is, and help less.
When they are exchanged or move on, nothing that is cached of the text moves.

Where a text is written, passages that are found anew come after those that are there, and only they
are read: the others move up, as they were read, and those that have been there longest make place.

Shapes: B rows, H heads of keys, R entries of the room, T tokens of a call, D head_dim.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from memorizing.huggingface.attaching.memory_settings import MemorySettings
from memorizing.huggingface.attaching.passages import CHUNK_LEN, Collection, Span, Words
from memorizing.memory import Memory
from memorizing.memory.frozen import FrozenMemory

ReadEntries = Callable[[], Iterator[tuple[int, tuple[Tensor, Tensor]]]]
"""Gives, per layer, keys and values (H, n, D) that were kept, the keys free of positions."""


@dataclass(frozen=True)
class Passage:
    """A stretch of a document that was read, or of the text itself."""

    document: str | None
    """Its name; None is the text that is being written or read now."""
    start: int
    """Its first token, counted from the beginning of the document."""
    end: int
    """The one after its last."""
    score: float = field(compare=False)
    """Share of attention of the chunk around which it lies."""
    chunk: int
    """The first token of this chunk."""
    is_at_end: bool
    """Whether its document ends with it."""
    entries: range | None = field(compare=False)
    """Numbers, in the open memory, of the entries of the chunk; None for the text itself."""
    ids: Tensor = field(compare=False, repr=False)
    """(n,) int64 on the CPU: its tokens, without those that are left out; -1 where their entries
    are kept."""
    kept: ReadEntries | None = field(default=None, compare=False, repr=False)
    """Gives these entries; None where the tokens are read again."""

    def shows(self, other: Passage) -> bool:
        """Whether this one has the chunk of another, and twice as much behind it.

        What the last tokens are like most is a chunk that they have left: a quote is in the next
        one, and goes on. Where the document ends earlier, that is enough.
        """
        return (
            self.document == other.document
            and self.start <= other.chunk
            and (other.chunk + 3 * CHUNK_LEN <= self.end or self.is_at_end)
        )

    def overlaps(self, other: Passage) -> bool:
        """Whether both have tokens in common."""
        is_same = self.document == other.document
        return is_same and self.start < other.end and other.start < self.end


class Library(Protocol):
    """The documents of an open memory."""

    @property
    def names(self) -> Sequence[str]:
        """Of all documents, in the order of their entries."""
        ...

    @property
    def num_entries(self) -> Sequence[int]:
        """Of every document."""
        ...

    @property
    def special_ids(self) -> tuple[int, ...]:
        """Of the tokens that are no words; none where no tokenizer is known."""
        ...

    def read_tokens(self, document: int) -> tuple[Tensor, Tensor]:
        """Of the entries of a document, their places (n,) in it and their ids (n,), both int64.

        Ids are -1 where entries of all layers are kept.

        Raises:
            MemoryFolderError: its text was not kept.
        """
        ...

    def read_ids(self) -> Tensor:
        """The tokens (n,) int64 of the entries of all documents; -1 where no text was kept.

        Raises:
            MemoryFolderError: a text became other tokens than were read.
        """
        ...

    def find_kept(self, document: int, numbers: Tensor) -> ReadEntries | None:
        """What gives entries (n,) of a document, counted from its first; None where texts are."""
        ...

    def shelve(self, collection: Collection) -> Searched:
        """These documents, to be searched; `collection` has their entries."""
        ...


WORDS = -1
"""Key of `Totals` for what words say; the others are layers."""

Totals = Mapping[int, Tensor]
"""Logs of sums over chunks: per layer (F * T,), and of words (4,)."""


@dataclass(frozen=True)
class Question:
    """What the last tokens of a text ask for."""

    queries: Mapping[int, Tensor]
    """See `sum_chunks`."""
    places: Mapping[int, Tensor]
    """See `sum_chunks`."""
    num_neighbors: int
    words: Words
    """That find."""


class Search(Protocol):
    """One question to one part of what is searched."""

    def count_holding(self) -> tuple[Tensor, int]:
        """Chunks that have each of the words (W,), and all chunks."""
        ...

    def sum_up(self, weights: Tensor) -> Totals:
        """The sums over its chunks. Words count as much as `weights` (W, 2) say."""
        ...

    def choose(self, totals: Totals, *, is_written: bool) -> list[Span]:
        """The best spans, best first, by shares of these sums over all parts."""
        ...


class Searched(Protocol):
    """Documents among which passages are found."""

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing to find."""
        ...

    def ask(self, question: Question, settings: MemorySettings) -> Search:
        """Begin to look for what is asked."""
        ...

    def fetch(self, spans: Sequence[Span]) -> Sequence[Passage | None]:
        """What stands in each of these spans; None cannot be reached now.

        Raises:
            MemoryFolderError: the text of a document was not kept, or became other tokens.
        """
        ...


@dataclass(frozen=True)
class Room:
    """What is in the room, for all rows."""

    passages: tuple[tuple[Passage, ...], ...]
    """Per row, what stands there, from the last to the first; one may stand there twice."""
    ids: Tensor
    """(B, R) int64 on the CPU: a start token and the tokens of the passages, at the end; -1 where
    their entries are kept."""
    first: Tensor
    """(B,) int64 on the CPU: the first of them that is there; R where a row found nothing."""
    before: Tensor = field(default_factory=lambda: torch.zeros(1, dtype=torch.int64))
    """(B or 1,) int64 on the CPU: the token of its text that each row of the room stands before."""
    read: tuple[tuple[Tensor, Tensor], ...] = ()
    """Per layer of the cache, keys and values (B, H, R, D) as they stand before a text that begins:
    rotated to the last places of what `MemorySettings.room_len` keeps free."""
    layers: tuple[tuple[Tensor, Tensor], ...] = ()
    """The same, rotated to where they stand now."""

    @property
    def length(self) -> int:
        """R: places that any row needs, the last ones of those that are kept free."""
        return self.ids.shape[1]

    def find_same(self, other: Room) -> Tensor:
        """Columns (B, m) int64 of another room that have the first m tokens of this one.

        All but the last one at most, whole passages in any order, in each row as many; those of
        places that are not there are any.
        """
        rows = []
        for row in range(len(self.passages)):
            columns, held = [0] * int(self.first[row]), other._list_columns(row)
            for passage, _ in self._list_columns(row):
                same = next((one for one in held if one[0] == passage), None)
                if same is None:
                    break
                held.remove(same)
                columns += same[1]
            rows.append(columns)
        least = min(self.length - 1, *map(len, rows))
        return torch.tensor([columns[:least] for columns in rows], dtype=torch.int64)

    def _list_columns(self, row: int) -> list[tuple[Passage | None, range]]:
        """Of the start token, which is None, and the passages of a row, from first to last."""
        columns, end = [], self.length
        for passage in self.passages[row]:
            columns.append((passage, range(end - len(passage.ids), end)))
            end -= len(passage.ids)
        columns.append((None, range(int(self.first[row]), end)))
        return columns[::-1]


def plan_room(passages: Sequence[tuple[Passage, ...]], start_token: int | None) -> Room | None:
    """Passages of all rows, the first ones last, with a start token before; None of none."""
    start = torch.tensor([] if start_token is None else [start_token], dtype=torch.int64)
    rows = []
    for found in passages:
        ids = [one.ids for one in reversed(found)]
        rows.append(torch.cat([start, *ids]) if found else start[:0])
    length = max(map(len, rows))
    if not length:
        return None
    ids = torch.zeros(len(rows), length, dtype=torch.int64)
    for row, tokens in enumerate(rows):
        ids[row, length - len(tokens) :] = tokens
    return Room(tuple(passages), ids, torch.tensor([length - len(tokens) for tokens in rows]))


def look_up_start_token(*sources: Any) -> int | None:
    """The `bos_token_id` of the first that has one, or else the `eos_token_id`.

    A tokenizer need not know the one that its model has (Qwen2.5).
    """
    for name in ("bos_token_id", "eos_token_id"):
        for source in sources:
            token = getattr(source, name, None)
            token = token[0] if isinstance(token, (list, tuple)) and token else token
            if isinstance(token, int) and not isinstance(token, bool):
                return token
    return None


@dataclass(frozen=True)
class OwnText:
    """What a row has read itself, as far as it has left the local window."""

    ids: Tensor
    """(n,) int64: all its tokens."""
    first: int
    """The first that has an entry and is found."""
    collection: Collection


def list_special_ids(source: Any) -> tuple[int, ...]:
    """Of the tokens that are no words, as far as a tokenizer, or else a configuration, says."""
    given = [getattr(source, "all_special_ids", None)]
    if given == [None]:
        given = [getattr(source, f"{name}_token_id", None) for name in ("bos", "eos", "pad")]
    lists = [one if isinstance(one, (list, tuple)) else [one] for one in given]
    return tuple(one for ids in lists for one in ids if type(one) is int)


def collect_own(
    memories: Mapping[int, Memory],
    row: int,
    ids: Tensor,
    special_ids: tuple[int, ...],
    num_sinks: int,
    end: int,
) -> OwnText:
    """The entries of a row's own text before token `end`, as one document.

    A text is not found from the first token on that is known by its embedding only.
    """
    first = num_sinks
    unknown = (ids < 0).nonzero().flatten()
    ids = ids[: int(unknown[0])] if len(unknown) else ids
    for memory in memories.values():
        written = int(memory.num_appended[row])
        first = max(first, written - int(memory.size[row]))
        end = min(end, written, len(ids))
    layers = {
        layer: FrozenMemory.from_tensors(
            _take_slots(memory.keys[row], first, end), _take_slots(memory.values[row], first, end)
        )
        for layer, memory in memories.items()
        if end > first
    }
    lengths = (end - first,) if layers else ()
    own = Collection(lengths, layers, lambda: ids[first:end], special_ids=special_ids)
    return OwnText(ids, first, own)


def _take_slots(ring: Tensor, first: int, end: int) -> Tensor:
    """Entries from the first to the one before the last (K, n, D), of a ring; a view if it can."""
    start = first % ring.shape[1]
    until_end = min(end - first, ring.shape[1] - start)
    part = ring[:, start : start + until_end]
    rest = ring[:, : end - first - until_end]
    return torch.cat([part, rest], 1) if rest.shape[1] else part


def make_passage(span: Span, part: Collection, source: Library | OwnText | None) -> Passage:
    """What stands in the room of a span of one or more entries.

    Args:
        span: inside of one document.
        part: the collection that it is of.
        source: what this is a collection of.

    Raises:
        MemoryFolderError: the text of a document was not kept, or became other tokens.
    """
    first, last = part.first_entries[span.document : span.document + 2]
    start, end, chunk = span.start - first, span.end - first, span.chunk - first
    chosen = torch.arange(start, end)[~part.is_left_out[span.start : span.end]]
    if isinstance(source, OwnText):
        name, entries, kept = None, None, None
        numbers = torch.arange(source.first, source.first + last)
        tokens = source.ids[numbers]
    else:
        assert source is not None
        name = source.names[span.document]
        entries = range(span.chunk, min(last, span.chunk + CHUNK_LEN))
        numbers, tokens = source.read_tokens(span.document)
        kept = source.find_kept(span.document, chosen)
    return Passage(
        document=name,
        start=int(numbers[start]),
        end=int(numbers[end - 1]) + 1,
        score=span.score,
        chunk=int(numbers[chunk]),
        # A text that is being read goes on behind what is found of it now.
        is_at_end=span.end == last and name is not None,
        entries=entries,
        ids=tokens[chosen],
        kept=kept,
    )
