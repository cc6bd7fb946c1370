"""What is learned from where passages are read: texts behind passages, as a memory puts them.

A text behind passages of a memory is worth what it is in one text with them: start token, passages,
text, the best passage last and twice (`attaching/passage_room.py`). So no memory is needed to train
with passages in sight. Those of an example are found by the words of the first tokens of its text,
by what a memory finds them with, among the documents that stand near its own in the corpus:

- `quoted`: among all of them, its own text too, so that the best passages have what comes next;
- `other`: as `quoted`, but for what stands within a passage of the text;
- `alone`: nowhere; there are none.
"""

from __future__ import annotations

import bisect
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Literal

import torch
from torch import Tensor

from memorizing.data import TokenizedDocument
from memorizing.huggingface.attaching.finding import Stretch, TextShelf, find_passages
from memorizing.huggingface.attaching.memory_settings import MemorySettings
from memorizing.huggingface.attaching.passage_room import plan_room

Kind = Literal["quoted", "other", "alone"]
KINDS: tuple[Kind, ...] = ("quoted", "other", "alone")
TEXT_LENS = (64, 128)
"""Tokens of a text, from the least to the most; fewer of a shorter document or window."""
PROMPT_LEN = 48
"""First tokens of a text, whose words find."""
SHELF_LEN = 32_768
"""Tokens of the documents that are searched together, at most."""
_HOW_MANY = (3, 5, 1, 1)
"""How often, of ten times, 1, 2, 3 or 4 passages at most are found."""


@dataclass(frozen=True)
class Example:
    """A text with what stands before it."""

    document: int
    """Number of the document that the text is of."""
    start: int
    """Its first token, in this document."""
    before: Tensor
    """(n,) int64: a start token, and passages."""
    text: Tensor
    """(m,) int64."""


class Examples:
    """Draws examples from documents; each depends on nothing but its seed and kind."""

    def __init__(
        self, documents: Sequence[TokenizedDocument], settings: MemorySettings, start_token: int
    ) -> None:
        """Put documents that stand side by side onto shelves; longer ones are cut.

        Args:
            documents: one or more, none without tokens.
            settings: of the memory that the model shall read: how many passages, how long.
            start_token: stands before everything.
        """
        self.documents, self._settings, self._start_token = documents, settings, start_token
        self.longest = min(TEXT_LENS[1], settings.window)
        """Tokens of the longest text."""
        self._pieces = [
            (number, start, min(start + SHELF_LEN, len(document.tokens)))
            for number, document in enumerate(documents)
            for start in range(0, len(document.tokens), SHELF_LEN)
        ]
        self._ends = list(accumulate(end - start for _, start, end in self._pieces))
        self._shelves = [0]
        """Per shelf, its first piece."""
        for piece, end in enumerate(self._ends):
            first = self._shelves[-1]
            if end - (self._ends[first - 1] if first else 0) > SHELF_LEN:
                self._shelves.append(piece)

    def draw(self, kind: Kind, seed: str) -> Example:
        """An example; with the same seed, the texts of all kinds are the same."""
        rng = random.Random(seed)
        piece = bisect.bisect_right(self._ends, rng.randrange(self._ends[-1]))
        document, first, last = self._pieces[piece]
        length = rng.randint(min(TEXT_LENS[0], self.longest), self.longest)
        length = min(length, last - first)
        start = rng.randrange(first, last - length + 1)
        most = self._settings.num_passages
        weights = [*_HOW_MANY, *[1] * most][:most]
        (number,) = rng.choices(range(1, most + 1), weights)
        text = self._take(document, start, start + length)
        before = torch.tensor([self._start_token])
        if kind != "alone":
            hidden = range(start, start + length) if kind == "other" else range(0)
            settings = replace(self._settings, num_passages=number)
            shelf = TextShelf(self._list_stretches(piece, document, hidden))
            before = stand_before(text[:PROMPT_LEN], shelf, settings, self._start_token)
        return Example(document, start, before, text)

    def _list_stretches(self, piece: int, document: int, hidden: range) -> list[Stretch]:
        """What stands on the shelf of a piece, without what is near tokens of a document."""
        shelf = bisect.bisect_right(self._shelves, piece) - 1
        after = [*self._shelves, len(self._pieces)][shelf + 1]
        parts = []
        for number, start, end in self._pieces[self._shelves[shelf] : after]:
            if number == document and hidden:
                near = self._settings.passage_len
                parts.append((number, start, min(end, hidden.start - near)))
                parts.append((number, max(start, hidden.stop + near), end))
            else:
                parts.append((number, start, end))
        return [
            Stretch(self.documents[number].name, start, self._take(number, start, end))
            for number, start, end in parts
            if start < end
        ]

    def _take(self, document: int, start: int, end: int) -> Tensor:
        return torch.from_numpy(self.documents[document].tokens[start:end].astype("int64"))


def stand_before(
    words: Tensor, shelf: TextShelf, settings: MemorySettings, start_token: int
) -> Tensor:
    """A start token, and the passages that words (n,) find, as a room for a text has them: (m,)."""
    found = () if shelf.is_empty else find_passages({}, {}, words, [shelf], settings)
    room = plan_room([(*found[:1] * settings.num_again, *found)], start_token)
    return torch.tensor([start_token]) if room is None else room.ids[0]
