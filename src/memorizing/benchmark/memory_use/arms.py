"""The arms of the comparison: what a model has of a package when it sees a prompt.

Every arm reads the same prompt with the same weights, and goes on from it in the same way. What is
pasted stands as the passages of a memory do: a start token, the passages, the best one last, then
the prompt.
"""

from __future__ import annotations

import copy
import glob
import inspect
import itertools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import DynamicCache

from memorizing.benchmark.memory_use.places import Package, Place
from memorizing.benchmark.memory_use.retrievers import (
    Finder,
    Found,
    SentenceEncoder,
)
from memorizing.data.text import hash_name
from memorizing.evaluation.bm25 import WordScorer
from memorizing.huggingface import (
    MemorySession,
    MemorySettings,
    add_memory,
    open_memory,
    remove_memory,
)
from memorizing.huggingface.attaching.attachment import get_attachment, unwrap
from memorizing.huggingface.attaching.passage_room import (
    OwnText,
    Passage,
    find_passages,
    look_up_start_token,
)
from memorizing.huggingface.attaching.passages import Collection
from memorizing.huggingface.attaching.window_cache import find_text
from memorizing.huggingface.releases import CACHE_NAME
from memorizing.huggingface.sessions.texts import encode_text
from memorizing.storage.folders import count_bytes

OnRead = Callable[[str], None]
"""Called with the name of the document that is being read."""


@dataclass
class Setup:
    """What all arms have in common."""

    model: Any
    """Without a memory."""
    tokenizer: Any
    folder: Path
    """Where memories are kept; for this comparison alone."""
    given: Mapping[str, Any]
    """Settings of the memory that finds passages, as `add_memory` takes them."""
    settings: MemorySettings = field(init=False)
    """The same in full."""
    encoder: SentenceEncoder | None = None
    query_len: int = 64
    """Last tokens of the prompt that passages from outside of the model are found by."""
    whole_len: int = 8192
    """Most tokens of whole files."""
    memories: Mapping[str, Path] = field(default_factory=dict)
    """By package: a memory of passages that is there, in the place of one in `folder`."""
    on_read: OnRead = lambda name: None
    finders: dict[tuple[str, str], Finder] = field(default_factory=dict)
    """By kind and package; made once for all arms."""

    def __post_init__(self) -> None:
        """Fill the settings in.

        Raises:
            ConfigError: one that cannot work with this model.
        """
        add_memory(self.model, **self.given, read="passages")
        self.settings = get_attachment(self.model).settings
        remove_memory(self.model)

    @property
    def start_tokens(self) -> list[int]:
        """Before what is pasted; the same as before the passages of a memory."""
        token = look_up_start_token(unwrap(self.model).config)
        return [] if token is None else [token]

    @property
    def prefix(self) -> list[int]:
        """What the tokenizer puts before a text of its own."""
        whole = encode_text(self.tokenizer, "a", is_whole=True).tolist()
        bos = self.tokenizer.bos_token_id
        return [bos] if bos is not None and whole[:1] == [bos] else []


@dataclass(frozen=True)
class Begun:
    """A prompt that was read."""

    cache: Any
    logits: Tensor
    """(1, 1, V): what the model expects next."""
    num_given: int
    """Tokens of passages or files that it sees besides the prompt."""
    found: tuple[Found, ...] = ()
    """The passages among them, best first."""
    shared_s: float = 0.0
    """Seconds that reading them took for an earlier prompt."""
    length: int = 0
    """Tokens of the text that a memory knows now: those of the prompt."""


class Reader(Protocol):
    """A model with what an arm gives it, in one package."""

    num_bytes: int
    """Stored for the package."""

    def begin(self, place: Place) -> Begun:
        """Find what helps, and read the prompt."""
        ...

    def go_on(self, begun: Begun, tokens: Sequence[int]) -> Tensor:
        """Logits (1, T, V) after each of more tokens. Changes the cache of `begun`."""
        ...

    def find(self, place: Place, num_passages: int) -> list[Found] | None:
        """The best passages, best first; None where the arm finds none."""
        ...

    def leave_out(self, name: str | None) -> None:
        """From now on nothing of this document is found, but all else."""
        ...


def copy_begun(begun: Begun) -> Begun:
    """Another one, to go on from twice."""
    return replace(begun, cache=copy.deepcopy(begun.cache))


@torch.inference_mode()
def _call(model: Any, tokens: Sequence[int], cache: Any, *, is_last_only: bool) -> Tensor:
    """Logits (1, T or 1, V)."""
    inner = unwrap(model)
    ids = torch.tensor([list(tokens)], device=inner.get_input_embeddings().weight.device)
    arguments: dict[str, Any] = {CACHE_NAME: cache, "use_cache": True}
    if is_last_only and "logits_to_keep" in inspect.signature(inner.forward).parameters:
        arguments["logits_to_keep"] = 1
    logits = inner(input_ids=ids, **arguments).logits
    return logits[:, -1:] if is_last_only else logits


class Pasting:
    """Passages in front of the prompt, as text; or none."""

    def __init__(
        self, setup: Setup, package: Package, finder: Finder | None, num_passages: int
    ) -> None:
        """Take what finds the passages."""
        self._setup, self._package = setup, package
        self._finder, self._num_passages = finder, num_passages
        self.num_bytes = 0 if finder is None else finder.num_bytes
        self._without: str | None = None

    def begin(self, place: Place) -> Begun:
        """See `Reader`."""
        found = tuple(self.find(place, self._num_passages) or ())
        parts = [self._package.find(one.document).tokens[one.start : one.end] for one in found]
        setup = self._setup
        # As passages of the memory stand: the best one last, and more than once.
        standing = [*reversed(parts), *parts[:1] * setup.settings.num_again]
        pasted = [*itertools.chain.from_iterable(standing)]
        before = [*setup.start_tokens, *pasted] if pasted else setup.prefix
        cache = DynamicCache(config=unwrap(setup.model).config)
        logits = _call(setup.model, [*before, *place.prompt], cache, is_last_only=True)
        return Begun(cache, logits, len(pasted), found)

    def go_on(self, begun: Begun, tokens: Sequence[int]) -> Tensor:
        """See `Reader`."""
        return _call(self._setup.model, tokens, begun.cache, is_last_only=False)

    def find(self, place: Place, num_passages: int) -> list[Found] | None:
        """See `Reader`."""
        if self._finder is None:
            return None
        query = place.prompt[-self._setup.query_len :]
        return self._finder.find(query, num_passages, without=self._without)

    def leave_out(self, name: str | None) -> None:
        """See `Reader`."""
        self._without = name


class WholeFiles:
    """The files that the answer is in, or made of, in front of the prompt: who could know that?

    Of one that is too long the part around the place. What is the same before several prompts is
    read once, and its time counted for each.
    """

    def __init__(self, setup: Setup, package: Package) -> None:
        """Plan for a package."""
        self._setup, self._package = setup, package
        self.num_bytes = sum(len(one.text.encode()) for one in package.documents)
        self._before: tuple[int, ...] = ()
        self._cache: Any = None
        self._read_s = 0.0
        self._without: str | None = None

    def begin(self, place: Place) -> Begun:
        """See `Reader`."""
        setup, shared_s = self._setup, self._read_s
        tokens = choose_whole(self._package, place, setup.whole_len, self._without)
        before = (*setup.start_tokens, *tokens) if tokens else tuple(setup.prefix)
        if self._cache is None or before != self._before:
            start, shared_s = time.perf_counter(), 0.0
            self._cache = DynamicCache(config=unwrap(setup.model).config)
            if before:
                _call(setup.model, before, self._cache, is_last_only=True)
            self._read_s, self._before = time.perf_counter() - start, before
        cache = copy.deepcopy(self._cache)
        logits = _call(setup.model, place.prompt, cache, is_last_only=True)
        return Begun(cache, logits, len(tokens), (), shared_s)

    def go_on(self, begun: Begun, tokens: Sequence[int]) -> Tensor:
        """See `Reader`."""
        return _call(self._setup.model, tokens, begun.cache, is_last_only=False)

    def find(self, place: Place, num_passages: int) -> list[Found] | None:
        """See `Reader`."""
        return None

    def leave_out(self, name: str | None) -> None:
        """See `Reader`."""
        self._without = name


def choose_whole(
    package: Package, place: Place, most: int, without: str | None = None
) -> tuple[int, ...]:
    """Tokens of the files that a place needs, the most important one last, `most` together.

    Parts of a longer file begin at multiples of half of what is left, so that places near one
    another have the same.
    """
    parts: list[tuple[int, ...]] = []
    for source in place.sources:
        if source.document == without:
            continue
        tokens, left = package.find(source.document).tokens, most - sum(map(len, parts))
        if len(tokens) > left:
            step = max(1, left // 2)
            start = max(0, (source.token - left // 4) // step * step)
            tokens = tokens[start : start + left]
        parts.append(tokens)
    return tuple(itertools.chain.from_iterable(reversed(parts)))


class Remembering:
    """A memory of the package, which the model reads with `open_memory`."""

    def __init__(self, setup: Setup, package: Package, path: Path) -> None:
        """Read what is not read yet. The model has its memory layers already."""
        self._setup, self._package = setup, package
        self._attachment = get_attachment(setup.model)
        settings = self._attachment.settings
        self._finds = settings.read == "passages"
        self._path, self._fingerprint = path, self._attachment.fingerprint()
        self._left_out: str | None = None
        self._session = self._whole = self._open(path)
        texts = {document.name: document.text for document in package.documents}
        self._whole.read(setup.tokenizer, texts, progress=lambda name, _: setup.on_read(name))
        self.num_bytes = count_bytes(path)

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
        with self._session.use():
            logits = _call(self._setup.model, prompt, cache, is_last_only=True)
        room = find_text(cache).room
        passages = () if room is None else room.passages[0]
        standing = [*passages, *passages[:1] * self._attachment.settings.num_again]
        return Begun(
            cache,
            logits,
            sum(len(one.ids) for one in standing),
            tuple(map(self._describe, passages)),
            length=len(prompt),
        )

    def go_on(self, begun: Begun, tokens: Sequence[int]) -> Tensor:
        """See `Reader`: as in `generate`, nothing is found by tokens that are still to come.

        Nor anew right after the prompt, by which passages were found.
        """
        changes: dict[str, Any] = {"looks_ahead": False}
        is_right_after = int(begun.cache.get_seq_length()) == begun.length
        if self._finds and is_right_after:
            changes["is_reading"] = False
        with self._session.use(), self._attachment.change_mode(**changes):
            return _call(self._setup.model, tokens, begun.cache, is_last_only=False)

    def find(self, place: Place, num_passages: int) -> list[Found] | None:
        """See `Reader`."""
        if not self._finds:
            return None
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
                opened.collection,
                opened.library,
                OwnText(torch.zeros(0, dtype=torch.int64), 0, Collection((), {})),
                replace(attachment.settings, num_passages=num_passages),
            )
        return [self._describe(one) for one in passages]

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
def _remember(setup: Setup, package: Package, settings: Mapping[str, Any]) -> Iterator[Reader]:
    kind = f"{settings['read']}-{settings.get('keep', 'text')}"
    path = setup.folder / f"{kind}-{hash_name(package.name):x}"
    if settings["read"] == "passages":
        path = setup.memories.get(package.name, path)
    add_memory(setup.model, **settings)
    try:
        yield Remembering(setup, package, path)
    finally:
        remove_memory(setup.model)


@contextmanager
def _paste(
    setup: Setup, package: Package, kind: str, make_scorer: Any, num_passages: int
) -> Iterator[Reader]:
    key = (kind, package.name)
    if key not in setup.finders:
        setup.on_read(f"all, for {kind}")
        length = setup.settings.passage_len
        setup.finders[key] = Finder(package, length, setup.tokenizer, make_scorer)
    yield Pasting(setup, package, setup.finders[key], num_passages)


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
    "bm25": Arm("BM25, pasted", _bm25()),
    "bm25-1": Arm("  the best one", _bm25(1)),
    "embedder": Arm("embedder, pasted", _embedder()),
    "embedder-1": Arm("  the best one", _embedder(1)),
    "whole": Arm("whole files", _whole, is_ranked=False),
}
"""By name, in the order of the tables."""
