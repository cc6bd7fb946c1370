"""Libraries of proofs: a document each, its files in the order in which they are built."""

from __future__ import annotations

import posixpath
import re
from collections.abc import Mapping
from pathlib import Path

from memorizing.data.corpora.isabelle import sort_by_imports
from standins.archives import read_members
from standins.texts import Documents, decode_lines

COQ_FOLDER = "usr/lib/ocaml/coq/"
HOL_FOLDER = "usr/share/hol-light/"

_COQ_COMMENT = re.compile(r"\(\*(?:(?!\(\*|\*\)).)*\*\)", re.DOTALL)
_COQ_REQUIRE = re.compile(
    r"(?:From\s+(\S+)\s+)?Require\s+(?:Import\s+|Export\s+)?([^.]*(?:\.\w[^.]*)*)\.\s"
)
_HOL_LOAD = re.compile(r'(?:needs|loads|loadt|#use)\s+"([^"]+)"')


def read_coq(package: str, path: Path) -> Documents:
    """A Coq library, `libcoq-iris` as `coq_iris.txt`, in the order of its `Require`s."""
    files = _read_sources(path, COQ_FOLDER, (".v",))
    name = package.removeprefix("libcoq-")
    yield f"coq_{name}.txt", join_files(files, find_coq_imports(files))


def read_hol_light(package: str, path: Path) -> Documents:
    """HOL Light: a document per folder (`hol_Multivariate.txt`), and `hol_core.txt` above them."""
    files = _read_sources(path, HOL_FOLDER, (".ml", ".hl"))
    imports = find_hol_imports(files)
    groups: dict[str, dict[str, str]] = {}
    for name, text in files.items():
        folder, slash, _ = name.partition("/")
        groups.setdefault(folder if slash else "core", {})[name] = text
    for group, members in sorted(groups.items()):
        yield f"hol_{group}.txt", join_files(members, imports)


def join_files(files: Mapping[str, str], imports: Mapping[str, list[str]]) -> bytes:
    """The files after one another, each after those it needs, an empty line after each."""
    ordered = sort_by_imports(sorted(files), imports)
    return "".join(f"{files[name].rstrip()}\n\n" for name in ordered).encode("utf-8")


def find_coq_imports(files: Mapping[str, str]) -> dict[str, list[str]]:
    """Which files of a Coq library each file requires, by path, sorted.

    A module is found by the end of its path (`Require Import algebra.ring` is
    `.../algebra/ring.v`); of several the one in the same folder, else the first by path. Modules of
    other libraries are passed over, save where only their last name is known here too: iris's
    `From stdpp Require gmap` counts as iris's own `gmap`. Such cycles are broken by the order.
    """
    by_ending: dict[str, list[str]] = {}
    for name in sorted(files):
        parts = name.removesuffix(".v").split("/")
        for i in range(len(parts)):
            by_ending.setdefault(".".join(parts[i:]), []).append(name)
    imports: dict[str, list[str]] = {}
    for name, text in files.items():
        needed: set[str] = set()
        for library, modules in _COQ_REQUIRE.findall(_strip_comments(text)):
            for module in modules.split():
                full = f"{library}.{module}" if library else module
                found = by_ending.get(full) or by_ending.get(module) or []
                folder = posixpath.dirname(name)
                near = [other for other in found if posixpath.dirname(other) == folder]
                needed.update((near or found)[:1])
        imports[name] = sorted(needed - {name})
    return imports


def find_hol_imports(files: Mapping[str, str]) -> dict[str, list[str]]:
    """Which files of HOL Light each file loads, by path from the root or from its own folder."""
    imports: dict[str, list[str]] = {}
    for name, text in files.items():
        loaded = _HOL_LOAD.findall(text)
        found = {*loaded, *(posixpath.join(posixpath.dirname(name), other) for other in loaded)}
        imports[name] = sorted(found & files.keys() - {name})
    return imports


def _strip_comments(text: str) -> str:
    """Coq without comments, which nest: from the innermost out."""
    while (stripped := _COQ_COMMENT.sub("", text)) != text:
        text = stripped
    return text


def _read_sources(path: Path, folder: str, suffixes: tuple[str, ...]) -> dict[str, str]:
    members = read_members(path, lambda name: name.startswith(folder) and name.endswith(suffixes))
    return {name.removeprefix(folder): decode_lines(raw) for name, raw in members.items()}
