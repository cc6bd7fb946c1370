"""Text files that a user names: files, folders, patterns. What is not text is left out, and said.

A folder's files are named by their path in it; a file that is given, or that a pattern matches, by
its path as given, so that a pattern means the same whether a shell expands it or not.
"""

from __future__ import annotations

import fnmatch
import glob
import os
import stat
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from memorizing.data.reading.places import explain_missing
from memorizing.errors import CorpusError

_BYTE_CODE = "__pycache__"
_MEMORY_FILE, _MEMORY_MARK = "manifest.json", b'"memorizing memory"'


@dataclass(frozen=True)
class TextFile:
    """A file that may be text; see `load_text`."""

    name: str
    path: Path


@dataclass
class LeftOut:
    """What was named and is not read: name and reason of each, in order."""

    items: list[tuple[str, str]] = field(default_factory=list)

    def add(self, name: str, reason: str) -> None:
        """Note one."""
        self.items.append((name, reason))

    def describe(self) -> str:
        """How many and why, the most frequent reason first; empty where there is none."""
        counts = Counter(reason for _, reason in self.items)
        return ", ".join(f"{count:,} {reason}" for reason, count in counts.most_common())


@dataclass(frozen=True)
class Rules:
    """What is left out of folders, and of everything."""

    max_bytes: int = 2**31
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
    seen: set[Path] = set()
    for where in given:
        for file in _expand(where, rules, left_out):
            real = file.path.resolve()
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
        raw = file.path.read_bytes()
    except OSError as error:
        left_out.add(file.name, f"cannot be read ({error.strerror})")
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
        matches = sorted(Path(match) for match in glob.glob(str(path), recursive=True))
        files = [match for match in matches if not match.is_dir()]
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
        left_out.add(str(error.filename), f"cannot be read ({error.strerror})")

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
        with (folder / _MEMORY_FILE).open("rb") as file:
            return _MEMORY_MARK in file.read(100)
    except OSError:
        return False


def _is_readable(file: TextFile, rules: Rules, left_out: LeftOut) -> bool:
    """Whether it is a plain file that is not too large; otherwise it is noted."""
    try:
        status = file.path.stat()
    except OSError as error:
        left_out.add(file.name, f"cannot be read ({error.strerror})")
        return False
    reason = ""
    if not stat.S_ISREG(status.st_mode):
        reason = "no plain file"
    elif status.st_size > rules.max_bytes:
        reason = f"larger than {rules.max_bytes / 2**20:.3g} MiB"
    if reason:
        left_out.add(file.name, reason)
    return not reason
