"""Calls in a package of Python files of what another of its files defines, by the parser.

Nothing is imported or run. What a name stands for is told by the imports of its file; what a method
belongs to is not known, so a method counts that another file defines, this one does not, and no
built-in type has.
"""

from __future__ import annotations

import ast
import builtins
import warnings
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import PurePosixPath

_BUILT_IN = frozenset(
    name
    for kind in vars(builtins).values()
    if isinstance(kind, type)
    for name in dir(kind)
)  # fmt: skip
_FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


@dataclass(frozen=True)
class Definition:
    """A function, class or method of a file."""

    file: str
    character: int
    """Where it begins in the text."""


@dataclass(frozen=True)
class CallSite:
    """A call with arguments."""

    file: str
    start: int
    """The character after the opening parenthesis."""
    end: int
    """The one after the closing parenthesis."""
    definitions: tuple[Definition, ...]
    """Of what may be called, in other files."""


def find_calls(files: Mapping[str, str], package: str) -> list[CallSite]:
    """The calls of all files, in the order of the files and of the text.

    Files that are not Python, as this Python has it, have none and define nothing.

    Args:
        files: texts by path in the package.
        package: its name, by which its files may import one another, as the names of its folders
            and files are too.
    """
    trees = {name: tree for name, text in files.items() if (tree := _parse(text)) is not None}
    roots = {
        package,
        *(part for name in files for part in PurePosixPath(name).with_suffix("").parts),
    }
    functions: dict[str, list[Definition]] = {}
    methods: dict[str, list[Definition]] = {}
    for name, tree in trees.items():
        starts = _Places(files[name])
        for node, is_method in _list_definitions(tree):
            found = Definition(name, starts.find(node.lineno, 0))
            (methods if is_method else functions).setdefault(node.name, []).append(found)
    return [
        site
        for name, tree in trees.items()
        for site in _find_in_file(name, tree, files[name], functions, methods, roots)
    ]


def _parse(text: str) -> ast.Module | None:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return ast.parse(text)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None


def _list_definitions(
    tree: ast.Module,
) -> Iterator[tuple[ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef, bool]]:
    """Functions and classes of a file, and methods of its classes with True."""
    for node in tree.body:
        if isinstance(node, (*_FUNCTIONS, ast.ClassDef)):
            yield node, False
        if isinstance(node, ast.ClassDef):
            yield from ((inner, True) for inner in node.body if isinstance(inner, _FUNCTIONS))


class _Places:
    """Characters of a text by the line and byte that the parser counts."""

    def __init__(self, text: str) -> None:
        self._lines = text.encode().splitlines(keepends=True)
        self._starts = [0]
        for line in self._lines:
            self._starts.append(self._starts[-1] + len(line.decode()))

    def find(self, line: int, byte: int) -> int:
        """Line from 1, byte in it from 0."""
        return self._starts[line - 1] + len(self._lines[line - 1][:byte].decode())


def _find_in_file(
    name: str,
    tree: ast.Module,
    text: str,
    functions: Mapping[str, list[Definition]],
    methods: Mapping[str, list[Definition]],
    roots: Collection[str],
) -> Iterator[CallSite]:
    ours, others = _list_imports(tree, roots)
    places = _Places(text)
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    for node in sorted(calls, key=lambda node: (node.end_lineno or 0, node.end_col_offset or 0)):
        called, found = node.func, []
        if isinstance(called, ast.Name):
            found = functions.get(ours.get(called.id, ""), [])
        elif isinstance(called, ast.Attribute):
            root = _find_root(called)
            if root in others or called.attr in _BUILT_IN or called.attr.startswith("__"):
                continue
            is_of_module = isinstance(called.value, ast.Name) and root in ours
            found = methods.get(called.attr, [])
            found = [*found, *(functions.get(called.attr, []) if is_of_module else [])]
        if not found or any(one.file == name for one in found):
            continue
        start = text.find("(", places.find(called.end_lineno or 0, called.end_col_offset or 0)) + 1
        end = places.find(node.end_lineno or 0, node.end_col_offset or 0)
        # Inside of f-strings the parser of Python 3.11 counts otherwise.
        arguments = text[start:end]
        is_whole = arguments.endswith(")") and _parse(f"f({arguments}") is not None
        if start and is_whole and arguments[:-1].strip():
            yield CallSite(name, start, end, tuple(found))


def _list_imports(tree: ast.Module, roots: Collection[str]) -> tuple[dict[str, str], set[str]]:
    """Names that imports bind: to something of the package, with its own name; to all else."""
    ours: dict[str, str] = {}
    others: set[str] = set()
    for node in ast.walk(tree):
        if not isinstance(node, (ast.Import, ast.ImportFrom)):
            continue
        for alias in node.names:
            module = (node.module or "") if isinstance(node, ast.ImportFrom) else alias.name
            is_relative = isinstance(node, ast.ImportFrom) and node.level > 0
            bound = alias.asname or alias.name.partition(".")[0]
            if is_relative or module.partition(".")[0] in roots:
                ours[bound] = alias.name
            else:
                others.add(bound)
    return ours, others


def _find_root(node: ast.expr) -> str:
    """`a` of `a.b().c[0].d`; empty where it is no name."""
    while True:
        if isinstance(node, ast.Name):
            return node.id
        if isinstance(node, (ast.Attribute, ast.Subscript)):
            node = node.value
        elif isinstance(node, ast.Call):
            node = node.func
        else:
            return ""


def cut_at_close(text: str) -> str | None:
    """The text up to the parenthesis that closes one opened before it; None where none does.

    Brackets in strings and in comments do not count.
    """
    depth, place = 1, 0
    while place < len(text):
        one = text[place]
        if one == "#":
            place = text.find("\n", place)
            if place < 0:
                return None
        elif one in "'\"":
            quote = text[place : place + 3] if text[place : place + 3] == 3 * one else one
            place += len(quote)
            while not text.startswith(quote, place):
                place += 2 if text[place : place + 1] == "\\" else 1
                if place >= len(text):
                    return None
            place += len(quote) - 1
        elif one in "([{":
            depth += 1
        elif one in ")]}":
            depth -= 1
            if not depth:
                return text[: place + 1]
        place += 1
    return None
