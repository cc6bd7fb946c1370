"""The arms of the comparison: what a model has of a package when it sees a prompt."""

from __future__ import annotations

import glob
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from memorizing.benchmark.memory_use.places import Package, Place
from memorizing.benchmark.memory_use.readers import (
    Begun,
    Pasting,
    Reader,
    Setup,
    WholeFiles,
    call_model,
)
from memorizing.benchmark.memory_use.retrievers import Finder, Found
from memorizing.data.text import hash_name
from memorizing.evaluation.bm25 import WordScorer
from memorizing.huggingface import MemorySession, add_memory, open_memory, remove_memory
from memorizing.huggingface.attaching.attachment import get_attachment, unwrap
from memorizing.huggingface.attaching.finding import find_passages
from memorizing.huggingface.attaching.passage_room import Passage, make_passage
from memorizing.huggingface.attaching.passages import Span
from memorizing.huggingface.attaching.window_cache import find_text
from memorizing.storage.folders import count_bytes


class Remembering:
    """A memory of the package, which the model reads with `open_memory`.

    Its passages are found by the memory itself, or from outside of the model by a finder.
    """

    def __init__(
        self, setup: Setup, package: Package, path: Path, finder: Finder | None = None
    ) -> None:
        """Read what is not read yet. The model has its memory layers already."""
        self._setup, self._package, self._finder = setup, package, finder
        self._attachment = get_attachment(setup.model)
        settings = self._attachment.settings
        self._finds = settings.read == "passages"
        self._path, self._fingerprint = path, self._attachment.fingerprint()
        self._left_out: str | None = None
        self._session = self._whole = self._open(path)
        texts = {document.name: document.text for document in package.documents}
        self._whole.read(setup.tokenizer, texts, progress=lambda name, _: setup.on_read(name))
        self.num_bytes = count_bytes(path) + (0 if finder is None else finder.index_bytes)

    def leave_out(self, name: str | None) -> None:
        """See `Reader`: the memory stays as it is, and is opened without the document."""
        if name == self._left_out:
            return
        self._left_out, self._session = name, self._whole
        if name is not None:
            others = [one.name for one in self._whole.documents if one.name != name]
            patterns = list(map(glob.escape, others))
            self._session = self._open(self._path, patterns) if others else self._open(None)

    def _open(self, path: Path | None, documents: Sequence[str] | None = None) -> MemorySession:
        return open_memory(
            self._setup.model,
            path,
            tokenizer=self._setup.tokenizer,
            documents=documents,
            fingerprint=self._fingerprint,
        )

    def begin(self, place: Place) -> Begun:
        """See `Reader`."""
        cache = self._session.new_cache()
        prompt = [*self._setup.prefix, *place.prompt]
        with self._session.use(), self._attachment.change_mode(passages=self._choose(place)):
            logits = call_model(self._setup.model, prompt, cache, is_last_only=True)
        room = find_text(cache).room
        standing = () if room is None else room.passages[0]
        return Begun(
            cache,
            logits,
            sum(len(one.ids) for one in standing),
            tuple(map(self._describe, dict.fromkeys(standing))),
            length=len(prompt),
        )

    def go_on(self, begun: Begun, tokens: Sequence[int]) -> Tensor:
        """See `Reader`: as in `generate`, nothing is found by tokens that are still to come.

        Nor anew right after the prompt, by which passages were found.
        """
        changes: dict[str, Any] = {"looks_ahead": False}
        is_right_after = int(begun.cache.get_seq_length()) == begun.length
        if self._finder is not None:  # what is there stays, as what is pasted does
            room = find_text(begun.cache).room
            changes["passages"] = () if room is None else room.passages[0]
        elif self._finds and is_right_after:
            changes["is_reading"] = False
        with self._session.use(), self._attachment.change_mode(**changes):
            return call_model(self._setup.model, tokens, begun.cache, is_last_only=False)

    def find(self, place: Place, num_passages: int) -> list[Found] | None:
        """See `Reader`."""
        if not self._finds:
            return None
        if self._finder is not None:
            return self._setup.search(self._finder, place, num_passages, self._left_out)
        attachment, inner = self._attachment, unwrap(self._setup.model)
        prompt = torch.tensor([[*self._setup.prefix, *place.prompt]], device=inner.device)
        cache = attachment.pass_cache(self._session.new_cache())
        with self._session.use():
            opened = attachment.opened
            assert opened is not None
            asked = attachment.ask(input_ids=prompt, **cache)
            passages = find_passages(
                {layer: queries[0] for layer, queries in asked.items()},
                {layer: opened.open_heads[layer].places for layer in asked},
                prompt[0].cpu(),
                [opened.searched],
                replace(attachment.settings, num_passages=num_passages),
            )
        return [self._describe(one) for one in passages]

    def _choose(self, place: Place) -> tuple[Passage, ...] | None:
        """What the finder finds, as the open memory has it; None where the memory finds.

        First tokens of a document have no entries, and are left out.
        """
        if self._finder is None:
            return None
        opened, extra = self._attachment.opened, len(self._setup.prefix)
        assert opened is not None
        assert opened.library is not None
        num_passages = self._attachment.settings.num_passages
        found = self._setup.search(self._finder, place, num_passages, self._left_out)
        passages = []
        for one in found:
            document = list(opened.library.names).index(one.document)
            places, _ = opened.library.read_tokens(document)
            edges = torch.tensor([one.start + extra, one.end + extra])
            first = opened.collection.first_entries[document]
            start, end = (first + torch.searchsorted(places, edges)).tolist()
            if start < end:
                span = Span(0, document, start, end, start, one.score)
                passages.append(make_passage(span, opened.collection, opened.library))
        return tuple(one for one in passages if len(one.ids))

    def _describe(self, passage: Passage) -> Found:
        """By the tokens of the text; those that the tokenizer puts before it are not counted."""
        extra = len(self._setup.prefix)
        start, end = passage.start - extra, passage.end - extra
        return Found(passage.document or "", start, end, passage.score)


@dataclass(frozen=True)
class Arm:
    """A line of the table."""

    label: str
    open: Callable[[Setup, Package], Any]
    """Gives a context manager of a `Reader`."""
    is_ranked: bool = True
    """False where it knows what nobody could."""


@contextmanager
def _remember(
    setup: Setup, package: Package, settings: Mapping[str, Any], finder: Finder | None = None
) -> Iterator[Reader]:
    keep = settings.get("keep", "text")
    path = setup.folder / f"{settings['read']}-{keep}-{hash_name(package.name):x}"
    if settings["read"] == "passages" and keep == setup.settings.keep:
        path = setup.memories.get(package.name, path)
    add_memory(setup.model, **settings)
    try:
        yield Remembering(setup, package, path, finder)
    finally:
        remove_memory(setup.model)


def _prepare_finder(setup: Setup, package: Package, kind: str, make_scorer: Any) -> Finder:
    key = (kind, package.name)
    if key not in setup.finders:
        setup.on_read(f"all, for {kind}")
        length = setup.settings.passage_len
        setup.finders[key] = Finder(package, length, setup.tokenizer, make_scorer)
    return setup.finders[key]


@contextmanager
def _paste(
    setup: Setup, package: Package, kind: str, make_scorer: Any, num_passages: int
) -> Iterator[Reader]:
    finder = _prepare_finder(setup, package, kind, make_scorer)
    yield Pasting(setup, package, finder, num_passages)


def _nothing(setup: Setup, package: Package) -> Any:
    return nullcontext(Pasting(setup, package, None, 0))


def _whole(setup: Setup, package: Package) -> Any:
    return nullcontext(WholeFiles(setup, package))


def _entries(setup: Setup, package: Package) -> Any:
    """The paper's way, in the default layer, with the window of the other."""
    return _remember(setup, package, {"window": setup.settings.window, "read": "entries"})


def _passages(num_passages: int | None = None, **changes: Any) -> Callable[[Setup, Package], Any]:
    def open_arm(setup: Setup, package: Package) -> Any:
        settings = {**setup.given, "read": "passages", **changes}
        if num_passages is not None:
            settings["num_passages"] = num_passages
        return _remember(setup, package, settings)

    return open_arm


def _bm25(num_passages: int | None = None) -> Callable[[Setup, Package], Any]:
    return lambda setup, package: _paste(
        setup, package, "BM25", WordScorer, num_passages or setup.settings.num_passages
    )


def _bm25_entries(setup: Setup, package: Package) -> Any:
    settings = {**setup.given, "read": "passages", "keep": "entries"}
    finder = _prepare_finder(setup, package, "BM25", WordScorer)
    return _remember(setup, package, settings, finder)


def _embedder(num_passages: int | None = None) -> Callable[[Setup, Package], Any]:
    def open_arm(setup: Setup, package: Package) -> Any:
        assert setup.encoder is not None
        number = num_passages or setup.settings.num_passages
        return _paste(setup, package, "embedder", setup.encoder.make_scorer, number)

    return open_arm


ARMS: dict[str, Arm] = {
    "nothing": Arm("nothing", _nothing),
    "entries": Arm("memory: entries", _entries),
    "passages": Arm("memory: passages", _passages()),
    "passages-1": Arm("  the best one", _passages(1)),
    "passages-entries": Arm("  kept as entries", _passages(keep="entries")),
    "bm25": Arm("BM25, pasted", _bm25()),
    "bm25-1": Arm("  the best one", _bm25(1)),
    "bm25-entries": Arm("  read as entries", _bm25_entries),
    "embedder": Arm("embedder, pasted", _embedder()),
    "embedder-1": Arm("  the best one", _embedder(1)),
    "whole": Arm("whole files", _whole, is_ranked=False),
}
"""By name, in the order of the tables."""
