"""Files that a path stands for: a file, a folder, a shell pattern. What is not text is left out.

A folder's files are named by their path in it; a file that is given, or that a pattern matches, by
its path as given, so that a pattern means the same whether a shell expands it or not.
"""

from __future__ import annotations

import fnmatch
import glob
import itertools
import os
import stat
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from memorizing.data.text import (
    MAX_FILE_BYTES,
    ReadLog,
    clean_name,
    explain_unreadable,
    find_files,
    is_plain,
)
from memorizing.errors import CorpusError
from memorizing.settings import find_nearest
from memorizing.storage.files import open_plain, read_bytes

_BYTE_CODE = "__pycache__"
_MEMORY_FILE, _MEMORY_MARK = "manifest.json", b'"memorizing memory"'


@dataclass(frozen=True)
class TextFile:
    """A file that may be text; see `load_text`."""

    name: str
    path: Path

    def __post_init__(self) -> None:
        """Make the name one that can be written."""
        object.__setattr__(self, "name", clean_name(self.name))


@dataclass
class LeftOut:
    """What was named and is not read: name and reason of each, in order."""

    items: list[tuple[str, str]] = field(default_factory=list)

    def add(self, name: str, reason: str) -> None:
        """Note one."""
        self.items.append((clean_name(name), reason))

    def describe(self) -> str:
        """How many and why, the most frequent reason first; empty where there is none."""
        counts = Counter(reason for _, reason in self.items)
        return ", ".join(f"{count:,} {reason}" for reason, count in counts.most_common())


@dataclass(frozen=True)
class Rules:
    """What is left out of folders, and of everything."""

    max_bytes: int = MAX_FILE_BYTES
    """Larger files are left out."""
    exclude: tuple[str, ...] = ()
    """Shell patterns of names of files or folders, or of whole paths in a folder."""

    def is_excluded(self, name: PurePosixPath) -> bool:
        """Whether a path in a folder matches one of the patterns, whole or by its last part."""
        return any(
            fnmatch.fnmatch(text, pattern)
            for pattern in self.exclude
            for text in (name.name, str(name))
        )


def find_text_files(given: Sequence[str], rules: Rules, left_out: LeftOut) -> list[TextFile]:
    """Files by the order of `given`, those of a folder sorted by path; each file once.

    In folders hidden entries, byte code, excluded ones and memories are left out, and links to
    folders are not followed. A pattern takes what it matches, in folders as well with `**`.

    Args:
        given: files, folders or shell patterns.
        rules: what is left out.
        left_out: where that is noted.

    Raises:
        CorpusError: a path that does not exist, a pattern that matches nothing, or two files of
            one name.
    """
    found: dict[str, TextFile] = {}
    seen: set[str] = set()
    for where in given:
        for file in _expand(where, rules, left_out):
            real = os.path.realpath(file.path)
            if real in seen:
                continue
            seen.add(real)
            other = found.get(file.name)
            if other is not None:
                raise CorpusError(
                    f"{str(other.path)!r} and {str(file.path)!r} would both be documents of the "
                    f"name {file.name!r}; name a folder above both, or read them one after the "
                    "other with different prefixes"
                )
            if _is_readable(file, rules, left_out):
                found[file.name] = file
    return list(found.values())


def load_text(file: TextFile, left_out: LeftOut) -> str | None:
    """The text of a file as it is, or None, noted in `left_out`, where there is none."""
    try:
        raw = read_bytes(file.path, most=MAX_FILE_BYTES)
    except OSError as error:
        left_out.add(file.name, explain_unreadable(error))
        return None
    text, reason = decode_whole(raw)
    if reason:
        left_out.add(file.name, reason)
    return text


def decode_whole(raw: bytes) -> tuple[str | None, str]:
    """Bytes as text, or None and the reason why they are none."""
    if b"\0" in raw:
        return None, "binary"
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError:
        return None, "not UTF-8"
    return (text, "") if text.strip() else (None, "empty")


def _expand(where: str, rules: Rules, left_out: LeftOut) -> Iterator[TextFile]:
    path = Path(where).expanduser()
    if path.is_dir():
        yield from _walk(path, rules, left_out)
    elif os.path.lexists(path):
        yield TextFile(path.as_posix(), path)
    elif glob.has_magic(where):
        _, files = expand_pattern(path)
        if not files:
            raise CorpusError(
                f"pattern {where!r} matches no file; try it in a shell with ls, and remember that "
                "** is needed to look into folders"
            )
        for match in files:
            if rules.is_excluded(PurePosixPath(match.as_posix())):
                left_out.add(match.as_posix(), "excluded")
            else:
                yield TextFile(match.as_posix(), match)
    else:
        raise explain_missing(path, where)


def _walk(root: Path, rules: Rules, left_out: LeftOut) -> Iterator[TextFile]:
    """Files of a folder, sorted."""

    def explain(name: PurePosixPath) -> str:
        if name.name.startswith("."):
            return "hidden"
        if name.name == _BYTE_CODE:
            return "byte code"
        if rules.is_excluded(name):
            return "excluded"
        return "memory" if _is_memory(root / name) else ""

    def note(error: OSError) -> None:
        left_out.add(str(error.filename), explain_unreadable(error))

    kept: list[PurePosixPath] = []
    for folder, folders, files in os.walk(root, onerror=note):
        base = PurePosixPath(Path(folder).relative_to(root).as_posix())
        for names, is_file in ((folders, False), (files, True)):
            for name in sorted(names):
                reason = explain(base / name)
                if reason:
                    left_out.add(str(base / name), reason)
                    if not is_file:
                        names.remove(name)
                elif is_file:
                    kept.append(base / name)
    for name in sorted(kept):
        yield TextFile(str(name), root / name)


def _is_memory(folder: Path) -> bool:
    """Whether a folder holds what a model has read: that is no text, though a part looks so."""
    try:
        with open(open_plain(folder / _MEMORY_FILE), "rb") as file:
            return _MEMORY_MARK in file.read(100)
    except OSError:
        return False


def _is_readable(file: TextFile, rules: Rules, left_out: LeftOut) -> bool:
    """Whether it is a plain file that is not too large; otherwise it is noted."""
    try:
        status = file.path.stat()
    except OSError as error:
        left_out.add(file.name, explain_unreadable(error))
        return False
    reason = ""
    if not stat.S_ISREG(status.st_mode):
        reason = "no plain file"
    elif status.st_size > rules.max_bytes:
        reason = f"larger than {rules.max_bytes / 2**20:.3g} MiB"
    if reason:
        left_out.add(file.name, reason)
    return not reason


def list_files(where: str, log: ReadLog, suffixes: tuple[str, ...] = ()) -> dict[str, Path]:
    """Files by name, sorted: the path from the folder, or from the fixed part of a pattern.

    `suffixes` narrows down a folder; a file or pattern is taken at its word.

    Raises:
        CorpusError: the path does not exist, or a pattern matches no file.
    """
    path = Path(where).expanduser()
    if path.is_dir():
        kept = find_files(
            path, log, keep=lambda name: not suffixes or name.lower().endswith(suffixes)
        )
        if not kept:
            what = " or ".join(suffixes) or "visible"
            raise CorpusError(
                f"folder {where!r} holds no {what} files; name a folder or file that does"
            )
        return {str(name): path / name for name in kept}
    if path.is_file():
        return {path.name: path}
    if os.path.lexists(path):
        raise CorpusError(f"{where!r} is neither a file nor a folder that can be read; name one")
    if glob.has_magic(str(path)):
        fixed, found = expand_pattern(path)
        files = [name for name in found if is_plain(name, str(name), log)]
        if not files:
            raise CorpusError(f"pattern {where!r} matches no file; {_describe_absence(fixed)}")
        return {name.relative_to(fixed).as_posix(): name for name in files}
    raise explain_missing(path, where)


def expand_pattern(pattern: Path) -> tuple[Path, list[Path]]:
    """The fixed part of a shell pattern, and what it matches but folders, sorted.

    As a shell does, `*` and `**` pass over hidden names; `**` follows no link, and so ends.
    """
    fixed = Path(*itertools.takewhile(lambda part: not glob.has_magic(part), pattern.parts))
    rest = pattern.parts[len(fixed.parts) :]
    dots = any(part.startswith(".") for part in rest)
    matches = [
        match
        for match in fixed.glob("/".join(rest))
        if dots or not any(part.startswith(".") for part in match.relative_to(fixed).parts)
    ]
    return fixed, sorted(match for match in matches if not match.is_dir())


def list_subfolders(where: str) -> list[Path]:
    """Visible direct subfolders, sorted.

    Raises:
        CorpusError: the path is not a folder, or has no subfolders.
    """
    path = Path(where).expanduser()
    if not path.is_dir():
        raise explain_missing(path, where)
    folders = sorted(
        p for p in path.iterdir() if p.is_dir() and not p.name.startswith((".", "__pycache__"))
    )
    if not folders:
        raise CorpusError(
            f"folder {where!r} has no subfolders; each document is a subfolder: name the folder "
            "above"
        )
    return folders


def explain_missing(path: Path, where: str) -> CorpusError:
    """The error for a path that is not there, with the nearest names in the folder above it."""
    if path.exists():
        return CorpusError(f"{where!r} is a file; give a folder")
    above = path.parent
    if not above.is_dir():
        return CorpusError(f"path {where!r} does not exist; {_describe_absence(above)}")
    return CorpusError(
        f"path {where!r} does not exist; "
        f"{find_nearest(path.name, sorted(p.name for p in above.iterdir()))}"
    )


def _describe_absence(folder: Path) -> str:
    """The first part of a folder's path that is not there, and where a relative path begins."""
    missing = next((p for p in [*reversed(folder.parents), folder] if not p.exists()), None)
    if missing is None:
        return f"the folder {str(folder)!r} is there, but has no such file: check the rest of it"
    if folder.is_absolute():
        return f"there is no {str(missing)!r}: give an existing path"
    return (
        f"it is relative to the working directory '.', where there is no {str(missing)!r}: run "
        "this in the folder that has it, or give the whole path"
    )
