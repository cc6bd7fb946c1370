"""Before anything is read: which documents are new, which are there, which have changed."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from memorizing.errors import ConfigError, CorpusError, MemoryFolderError

if TYPE_CHECKING:
    from memorizing.data.reading.files import Rules
    from memorizing.data.text import ReadLog
    from memorizing.memory.disk import MemoryFolder

STDIN = "-"
_NAMES_SHOWN = 3


@dataclass(frozen=True)
class Source:
    """A document that can be read."""

    name: str
    num_bytes: int
    load: Callable[[], str | None]
    """Its text, as it is now; None where it is gone."""


@dataclass
class Plan:
    """What is to be done."""

    new: list[Source] = field(default_factory=list)
    changed: list[Source] = field(default_factory=list)
    """Their names are in the memory, with other texts."""
    num_known: int = 0
    """Documents that are there as they are."""

    @property
    def sources(self) -> list[Source]:
        """All that is read, new ones last."""
        return [*self.changed, *self.new]

    @property
    def num_bytes(self) -> int:
        """Of all that is read."""
        return sum(source.num_bytes for source in self.sources)


def plan_reading(
    sources: Sequence[Source], folder: MemoryFolder | None, *, update: bool, path: object
) -> Plan:
    """Compare documents with what a memory holds; every text is loaded once.

    Args:
        sources: the documents.
        folder: the memory; None is a new one.
        update: whether documents that have changed may be replaced.
        path: of the memory, for messages.

    Raises:
        MemoryFolderError: documents have changed, and `update` is not set.
    """
    from memorizing.memory.disk import hash_text

    plan = Plan()
    for source in sources:
        known = folder.contents.find_document(source.name) if folder else None
        text = source.load() if known else None
        if known is None:
            plan.new.append(source)
        elif text is not None and hash_text(text) == known.sha256:
            plan.num_known += 1
        else:
            plan.changed.append(source)
    if plan.changed and not update:
        names = ", ".join(source.name for source in plan.changed[:_NAMES_SHOWN])
        more = ", ..." if len(plan.changed) > _NAMES_SHOWN else ""
        raise MemoryFolderError(
            f"{path} holds {len(plan.changed):,} of these documents with another text than they "
            f"have now ({names}{more}); --update reads them again, in their place"
        )
    return plan


def find_sources(
    given: Sequence[str], rules: Rules, prefix: str, name: str | None, left_out: ReadLog
) -> list[Source]:
    """The documents that words on the command line stand for; `-` is standard input.

    Raises:
        ConfigError: standard input without a name, or a name without it.
        CorpusError: a path that is not there, two documents of one name, or no text at all.
    """
    from memorizing.data.reading.files import find_text_files, load_text

    if (STDIN in given) != (name is not None):
        raise ConfigError(
            "standard input (-) has no name; give one with --name"
            if name is None
            else f"--name {name} is the name of standard input, which is not read; add - to FILES"
        )
    sources = []
    files = find_text_files([word for word in given if word != STDIN], rules, left_out)
    for file, path in files.items():
        load = functools.partial(load_text, path, file, left_out)
        text = load()
        if text is not None:
            sources.append(Source(prefix + file, len(text.encode()), load))
    if name is not None:
        text = read_stdin()
        if any(source.name == prefix + name for source in sources):
            raise CorpusError(f"--name is {name!r}, which is a file's name too; give another one")
        sources.append(Source(prefix + name, len(text.encode()), lambda: text))
    if not sources:
        reasons = left_out.describe()
        raise CorpusError(
            "there is nothing to read: "
            + (f"left out were {reasons}" if reasons else "no file was found")
            + "; name files of text"
        )
    return sources


def read_stdin() -> str:
    """All of standard input, as text.

    Raises:
        CorpusError: it is empty or no text.
    """
    from memorizing.data.reading.files import decode_whole

    try:
        raw = sys.stdin.buffer.read()
    except OSError as error:
        raise CorpusError(f"standard input cannot be read: {error.strerror}") from error
    text, reason = decode_whole(raw)
    if text is None:
        raise CorpusError(f"standard input is {reason}; it must be text in UTF-8")
    return text


def is_utf8(text: str) -> bool:
    """Whether a word of the command line was UTF-8: what was not is there as lone surrogates."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
