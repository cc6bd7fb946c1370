"""Texts that were read, and places in them that a model is asked about."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from memorizing.data.text import shuffle_names
from memorizing.errors import ConfigError, CorpusError
from memorizing.huggingface.sessions.texts import encode_text

MIN_START = 200
"""Tokens of a file before the first prompt: what every file begins with is no quote."""
_WORD = re.compile(r"[^\W\d]\w*")


@dataclass(frozen=True)
class ReadText:
    """A document that is read into every memory."""

    name: str
    text: str
    tokens: tuple[int, ...] = field(repr=False)
    """Without special tokens."""


@dataclass(frozen=True)
class Package:
    """Documents that are in one memory."""

    name: str
    documents: tuple[ReadText, ...]

    def find(self, name: str) -> ReadText:
        """The document of a name."""
        return next(one for one in self.documents if one.name == name)

    @property
    def num_tokens(self) -> int:
        """Of all documents."""
        return sum(len(one.tokens) for one in self.documents)


@dataclass(frozen=True)
class Source:
    """Where something stands that an answer needs."""

    document: str
    token: int
    """Counted from the beginning of the document."""


@dataclass(frozen=True)
class Place:
    """A prompt and what truly comes next."""

    package: str
    document: str
    """Where both stand."""
    prompt: tuple[int, ...]
    answer: tuple[int, ...]
    """One token or more."""
    sources: tuple[Source, ...]
    """What the answer is in, or is made of, the most important first."""
    left_out: bool = False
    """The document is not in memory."""


def encode_package(tokenizer: Any, name: str, texts: Sequence[tuple[str, str]]) -> Package:
    """A package of documents (name, text)."""
    return Package(
        name,
        tuple(
            ReadText(document, text, tuple(encode_text(tokenizer, text).tolist()))
            for document, text in texts
        ),
    )


def draw_quotes(
    package: Package, num_prompts: int, *, prompt_len: int, answer_len: int, seed: int
) -> list[Place]:
    """Places spread evenly over the documents that are long enough, drawn in each.

    Raises:
        ConfigError: a length or number below 1.
        CorpusError: no document is long enough.
    """
    for name, value in (
        ("prompts", num_prompts), ("prompt_len", prompt_len), ("answer_len", answer_len)
    ):  # fmt: skip
        if value < 1:
            raise ConfigError(f"{name} is {value}; allowed: 1 or more")
    length = prompt_len + answer_len
    by_name = {one.name: one for one in package.documents if len(one.tokens) >= MIN_START + length}
    if not by_name:
        longest = max((len(one.tokens) for one in package.documents), default=0)
        raise CorpusError(
            f"a prompt of {prompt_len} tokens and its answer of {answer_len} need a file of "
            f"{MIN_START + length} tokens, and the longest has {longest:,}; give longer files, or "
            "shorter prompts and answers"
        )
    places = []
    names = shuffle_names(by_name, seed)[:num_prompts]
    for number, name in enumerate(names):
        tokens = by_name[name].tokens
        starts = range(MIN_START, len(tokens) - length + 1)
        count = num_prompts // len(names) + (number < num_prompts % len(names))
        drawn = random.Random(f"{seed} {name}").sample(starts, min(count, len(starts)))
        for start in sorted(drawn):
            middle = start + prompt_len
            places.append(
                Place(
                    package.name,
                    name,
                    tokens[start:middle],
                    tokens[middle : start + length],
                    (Source(name, middle),),
                )
            )
    return places


def rename_words(place: Place, tokenizer: Any, seed: int) -> Place:
    """The place with every name of its prompt, of three letters or more, in other letters.

    A name becomes the same other one at all its places; the answer stays.
    """
    generator = random.Random(f"{seed} {place.document} {place.sources[0].token}")
    renamed: dict[str, str] = {}

    def rename(match: re.Match[str]) -> str:
        word = match[0]
        if len(word) < 3:
            return word
        if word not in renamed:
            renamed[word] = "".join(generator.choices("abcdefghijklmnopqrstuvwxyz", k=len(word)))
        return renamed[word]

    text = _WORD.sub(rename, tokenizer.decode(list(place.prompt)))
    return replace(place, prompt=tuple(encode_text(tokenizer, text).tolist()))
