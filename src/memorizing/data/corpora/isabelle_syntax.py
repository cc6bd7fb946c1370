"""What Isabelle's theory files and ROOT files say about imports and sessions.

After *The Isabelle/Isar Reference Manual* (theory headers, outer syntax) and *The Isabelle System
Manual* (session ROOT specifications). Only what names files is read.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

_TOKEN = re.compile(
    r"(?P<open>\(\*|\{\*|\\<open>|‹)"
    r'|"(?P<string>(?:[^"\\]|\\.)*)"'
    r"|`(?:[^`\\]|\\.)*`"
    r"|(?P<word>(?:[\w.'/~$]|\\<\^?\w+>|-(?!\s))+)"
    r"|(?P<mark>\S)",
    re.DOTALL,
)
# Comments and cartouches nest; verbatim text does not.
_NESTING = {
    "(*": re.compile(r"(?P<open>\(\*)|\*\)"),
    "{*": re.compile(r"(?P<open>(?!))|\*\}"),
    "\\<open>": re.compile(r"(?P<open>\\<open>|‹)|\\<close>|›"),
    "‹": re.compile(r"(?P<open>\\<open>|‹)|\\<close>|›"),
}
_HEADER_ENDS = frozenset({"keywords", "abbrevs", "uses", "begin"})
_SESSION_PARTS = frozenset(
    {
        "description",
        "options",
        "sessions",
        "directories",
        "theories",
        "document_theories",
        "document_files",
        "export_files",
        "export_classpath",
    }
)
_CHAPTERS = frozenset({"session", "chapter", "chapter_definition"})


@dataclass(frozen=True)
class Session:
    """An entry of a ROOT file."""

    name: str
    directory: str
    """Relative to the ROOT file's folder."""
    directories: tuple[str, ...]
    """Further folders of its theories, relative to `directory`."""
    theories: tuple[str, ...]
    """In the order given; relative to `directory`, without `.thy`."""


def read_imports(text: str) -> list[str]:
    """What a theory imports, as it is written there; nothing where there is no theory header."""
    imports: list[str] = []
    part = ""
    for kind, value in _tokenize(text):
        if kind == "word" and value == "theory" and not part:
            part = "theory"
        elif kind == "word" and value == "imports" and part == "theory":
            part = "imports"
        elif kind == "word" and value in _HEADER_ENDS and part:
            break
        elif part == "imports" and kind in ("word", "string"):
            imports.append(value)
    return imports


def read_root(text: str) -> list[Session]:
    """The sessions of a ROOT file, in its order."""
    sessions: list[Session] = []
    tokens = list(_tokenize(text))
    starts = [i for i, (kind, value) in enumerate(tokens) if kind == "word" and value in _CHAPTERS]
    for begin, end in zip(starts, [*starts[1:], len(tokens)], strict=True):
        if tokens[begin][1] == "session" and begin + 1 < end:
            sessions.append(_read_session(tokens[begin + 1 : end]))
    return sessions


def _read_session(tokens: list[tuple[str, str]]) -> Session:
    name, directory, part, depth = tokens[0][1], ".", "head", 0
    named: dict[str, list[str]] = {"directories": [], "theories": []}
    for kind, value in tokens[1:]:
        if kind == "mark" and value in "([":
            depth += 1
        elif kind == "mark" and value in ")]":
            depth -= 1
        elif depth:
            continue
        elif part in ("head", "in") and (kind, value) == ("mark", "="):
            part = "parent"
        elif part == "head" and (kind, value) == ("word", "in"):
            part = "in"
        elif part == "in" and kind in ("word", "string"):
            directory, part = value, "head"
        elif part != "head" and kind == "word" and value in _SESSION_PARTS:
            part = value
        elif part in named and kind in ("word", "string"):
            named[part].append(value)
    return Session(name, directory, tuple(named["directories"]), tuple(named["theories"]))


def _tokenize(text: str) -> Iterator[tuple[str, str]]:
    """Words, strings and single marks; comments, cartouches and verbatim text are passed over."""
    place = 0
    while match := _TOKEN.search(text, place):
        place = match.end()
        kind = match.lastgroup
        if kind == "open":
            place = _find_end(text, match.group(), place)
        elif kind is not None:
            yield kind, match.group(kind)


def _find_end(text: str, opening: str, place: int) -> int:
    depth = 1
    for match in _NESTING[opening].finditer(text, place):
        depth += 1 if match.group("open") else -1
        if not depth:
            return match.end()
    return len(text)
