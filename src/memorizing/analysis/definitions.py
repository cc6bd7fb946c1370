"""Where a text defines what it names: functions, classes, first assignments, lemmas."""

from __future__ import annotations

import ast
import re
import warnings
from collections.abc import Iterator
from dataclasses import dataclass

WORD = re.compile(r"\d[\w.]*|[^\W\d][\w']*")
"""A number, or a word that may be an identifier."""
_PYTHON = re.compile(r"^\s*(?:async\s+def|def|class|import|from)\s", re.MULTILINE)
_LEMMAS = "lemma theorem corollary proposition fact remark axiom"
_OTHERS = (
    "def class fn func function fun struct enum union trait interface module namespace const let "
    "var val type typedef definition abbreviation primrec inductive datatype record locale "
    "fixpoint instance variable parameter sub procedure method macro"
)
_BEFORE = "pub export default async static private public protected final abstract local inline"
_DECLARED = re.compile(
    rf"^[ \t]*(?:(?:{'|'.join(_BEFORE.split())})[ \t]+)*"
    rf"({'|'.join((_LEMMAS + ' ' + _OTHERS).split())})[ \t]+(?:rec[ \t]+)?(?:\([^)\n]*\)[ \t]*)?"
    r"([^\W\d][\w']*)",
    re.MULTILINE | re.IGNORECASE,
)


@dataclass(frozen=True)
class Definition:
    """A line that says what a name is."""

    name: str
    start: int
    """First character of the line."""
    end: int
    """The one after its last."""
    is_lemma: bool


def find_definitions(text: str) -> list[Definition]:
    """Definitions in a text, in order.

    By Python's own parser where it can read the text: functions, classes, and the first assignment
    of every other name or attribute. Elsewhere lines that begin with a declaring keyword.
    """
    tree = _parse(text) if _PYTHON.search(text) else None
    if tree is None:
        found = [
            (match[2], match.start(2), match[1].lower() in _LEMMAS.split())
            for match in _DECLARED.finditer(text)
        ]
    else:
        starts = [0, *(match.end() for match in re.finditer(r"\r\n|\r|\n", text))]
        found = [
            (name, starts[min(line, len(starts)) - 1], False) for name, line in _list_names(tree)
        ]
    definitions = []
    for name, place, is_lemma in sorted(found, key=lambda item: item[1]):
        start = max(text.rfind("\n", 0, place), text.rfind("\r", 0, place)) + 1
        end = re.compile(r"[\r\n]|\Z").search(text, place)
        assert end is not None
        definitions.append(Definition(name, start, end.start(), is_lemma))
    return definitions


def _parse(text: str) -> ast.Module | None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return ast.parse(text)
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            return None


def _list_names(tree: ast.Module) -> Iterator[tuple[str, int]]:
    """Names and their lines, counted from 1."""
    first: dict[str, int] = {}
    declared: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            declared.add(node.name)
            yield node.name, node.lineno
            continue
        name = None
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            name = node.id
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            name = node.attr
        if name is not None and isinstance(node, (ast.Name, ast.Attribute)):
            line = node.end_lineno or node.lineno
            first[name] = min(line, first.get(name, line))
    yield from ((name, line) for name, line in first.items() if name not in declared)
