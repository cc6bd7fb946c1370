"""What a model has of a package when it sees a prompt: nothing, passages as text, or whole files.

Every arm of the comparison reads the same prompt with the same weights, and goes on from it in the
same way. What is pasted stands as the passages of a memory do: a start token, the passages, the
best one last, then the prompt.
"""

from __future__ import annotations

import copy
import inspect
import itertools
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import DynamicCache

from memorizing.benchmark.memory_use.places import Package, Place
from memorizing.benchmark.memory_use.retrievers import Finder, Found, SentenceEncoder
from memorizing.huggingface import MemorySettings, add_memory, remove_memory
from memorizing.huggingface.attaching.attachment import get_attachment, unwrap
from memorizing.huggingface.attaching.passage_room import look_up_start_token
from memorizing.huggingface.releases import CACHE_NAME
from memorizing.huggingface.sessions.texts import encode_text

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

    def search(
        self, finder: Finder, place: Place, num_passages: int, without: str | None
    ) -> list[Found]:
        """What is found from outside of the model, best first; nothing of one document."""
        return finder.find(place.prompt[-self.query_len :], num_passages, without=without)


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
def call_model(model: Any, tokens: Sequence[int], cache: Any, *, is_last_only: bool) -> Tensor:
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
        logits = call_model(setup.model, [*before, *place.prompt], cache, is_last_only=True)
        return Begun(cache, logits, len(pasted), found)

    def go_on(self, begun: Begun, tokens: Sequence[int]) -> Tensor:
        """See `Reader`."""
        return call_model(self._setup.model, tokens, begun.cache, is_last_only=False)

    def find(self, place: Place, num_passages: int) -> list[Found] | None:
        """See `Reader`."""
        if self._finder is None:
            return None
        return self._setup.search(self._finder, place, num_passages, self._without)

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
                call_model(setup.model, before, self._cache, is_last_only=True)
            self._read_s, self._before = time.perf_counter() - start, before
        cache = copy.deepcopy(self._cache)
        logits = call_model(setup.model, place.prompt, cache, is_last_only=True)
        return Begun(cache, logits, len(tokens), (), shared_s)

    def go_on(self, begun: Begun, tokens: Sequence[int]) -> Tensor:
        """See `Reader`."""
        return call_model(self._setup.model, tokens, begun.cache, is_last_only=False)

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
