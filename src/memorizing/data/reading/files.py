"""Files that a path stands for: a file, a folder, a shell pattern. What is not text is left out."""

from __future__ import annotations

import errno
import fnmatch
import glob
import itertools
import os
import re
import stat
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from memorizing.data.text import ReadLog, clean_name, drop_binary, summarize_error
from memorizing.errors import CorpusError, ResourceError
from memorizing.settings import find_nearest
from memorizing.storage import files as storage

MAX_FILE_BYTES = 2**31
"""Larger files are no text that somebody wrote, and are left out."""
_BYTE_CODE = "__pycache__"
_MEMORY_FILE, _MEMORY_MARK = "manifest.json", b'"memorizing memory"'


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


def find_text_files(given: Sequence[str], rules: Rules, log: ReadLog) -> dict[str, Path]:
    """Files by name, in the order of `given`, those of a folder sorted by path; each file once.

    A folder's files are named by their path in it; a file that is given, or that a pattern matches,
    by its path as given, so that a pattern means the same whether a shell expands it or not.

    In folders hidden entries, byte code, excluded ones and memories are left out, and links to
    folders are not followed. A pattern takes what it matches, in folders as well with `**`.

    Args:
        given: files, folders or shell patterns.
        rules: what is left out.
        log: where that is noted.

    Raises:
        CorpusError: a path that does not exist, a pattern that matches nothing, or two files of
            one name.
    """
    found: dict[str, Path] = {}
    seen: set[str] = set()
    for where in given:
        for shown, path in _expand(where, rules, log):
            real, name = os.path.realpath(path), clean_name(shown)
            if real in seen:
                continue
            seen.add(real)
            if name in found:
                raise CorpusError(
                    f"{str(found[name])!r} and {str(path)!r} would both be documents of the "
                    f"name {name!r}; name a folder above both, or read them one after the "
                    "other with different prefixes"
                )
            if is_plain(path, name, log, rules.max_bytes):
                found[name] = path
    return found


def load_text(path: Path, name: str, log: ReadLog) -> str | None:
    """The text of a file as it is, or None, noted in `log`, where there is none."""
    raw = read_bytes(path, name, log)
    if raw is None:
        return None
    text, reason = decode_whole(raw)
    if reason:
        log.skip(name, reason)
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


def _expand(where: str, rules: Rules, log: ReadLog) -> Iterator[tuple[str, Path]]:
    path = locate(where)
    if path.is_dir():

        def explain(name: PurePosixPath) -> str:
            if rules.is_excluded(name):
                return "excluded"
            return "memory" if _is_memory(path / name) else ""

        yield from ((str(name), path / name) for name in walk(path, log, explain, is_told=True))
    elif os.path.lexists(path):
        yield path.as_posix(), path
    elif glob.has_magic(where):
        _, files = expand_pattern(path)
        if not files:
            raise CorpusError(
                f"pattern {where!r} matches no file; try it in a shell with ls, and remember that "
                "** is needed to look into folders"
            )
        for match in files:
            if rules.is_excluded(PurePosixPath(match.as_posix())):
                log.skip(match.as_posix(), "excluded")
            else:
                yield match.as_posix(), match
    else:
        raise explain_missing(path, where)


def _is_memory(folder: Path) -> bool:
    """Whether a folder holds what a model has read: that is no text, though a part looks so."""
    try:
        with open(storage.open_plain(folder / _MEMORY_FILE), "rb") as file:
            return _MEMORY_MARK in file.read(100)
    except OSError:
        return False


def find_files(
    root: Path,
    log: ReadLog,
    keep: Callable[[str], bool] = lambda name: True,
    explain: Callable[[PurePosixPath], str] = lambda path: "",
) -> list[PurePosixPath]:
    """Files under `root` whose names are kept, as `walk` finds them; only plain ones."""
    found = (name for name in walk(root, log, explain) if keep(name.name))
    return [name for name in found if is_plain(root / name, str(name), log)]


def walk(
    root: Path, log: ReadLog, explain: Callable[[PurePosixPath], str], *, is_told: bool = False
) -> list[PurePosixPath]:
    """What is under `root` and no folder, relative to it, sorted.

    Hidden entries and byte code are left out; links to folders are not followed.

    Args:
        root: where.
        log: where folders that cannot be read are noted.
        explain: why a file, or a folder with all that is in it, is left out; "" takes it.
        is_told: whether what is left out is noted as well.
    """

    def note(error: OSError) -> None:
        log.skip(str(error.filename), explain_unreadable(error))

    found: list[PurePosixPath] = []
    for folder, folders, files in os.walk(root, onerror=note):
        base = PurePosixPath(Path(folder).relative_to(root).as_posix())
        for names, is_file in ((folders, False), (files, True)):
            for name in sorted(names):
                reason = "hidden" if name.startswith(".") else ""
                reason = reason or ("byte code" if name == _BYTE_CODE else explain(base / name))
                if not reason and is_file:
                    found.append(base / name)
                if reason and is_told:
                    log.skip(str(base / name), reason)
                if reason and not is_file:
                    names.remove(name)
    return sorted(found)


def is_plain(path: Path, name: str, log: ReadLog, most: int = MAX_FILE_BYTES) -> bool:
    """Whether there is a file to read, also behind a link; otherwise it is noted in `log`."""
    try:
        status = path.stat()
    except OSError as error:
        log.skip(name, explain_unreadable(error))
        return False
    if not stat.S_ISREG(status.st_mode):
        log.skip(name, "no plain file")
    elif status.st_size > most:
        log.skip(name, f"larger than {most / 2**20:.3g} MiB")
    else:
        return True
    return False


def read_bytes(path: Path, name: str, log: ReadLog) -> bytes | None:
    """Bytes of a text file, or None, noted in `log`, where it is binary or cannot be read."""
    try:
        raw = storage.read_bytes(path, most=MAX_FILE_BYTES)
    except OSError as error:
        log.skip(name, explain_unreadable(error))
        return None
    return drop_binary(name, raw, log)


def explain_unreadable(error: OSError) -> str:
    """Why a file cannot be read, for a note.

    Raises:
        ResourceError: too many files are open: going on would leave out the rest as well.
    """
    reason = storage.describe_failure(error)
    if error.errno in (errno.EMFILE, errno.ENFILE):
        raise ResourceError(f"cannot go on reading: {reason}") from error
    return f"cannot be read ({reason})"


def list_files(where: str, log: ReadLog, suffixes: tuple[str, ...] = ()) -> dict[str, Path]:
    """Files by name, sorted: the path from the folder, or from the fixed part of a pattern.

    `suffixes` narrows down a folder; a file or pattern is taken at its word.

    Raises:
        CorpusError: the path does not exist, or a pattern matches no file.
    """
    path = locate(where)
    if path.is_dir():
        kept = find_files(path, log, lambda name: not suffixes or name.lower().endswith(suffixes))
        if not kept:
            what = " or ".join(suffixes) or "visible"
            reasons = f" that can be read ({'; '.join(log.lines[:3])})" if log.items else ""
            raise CorpusError(
                f"folder {where!r} holds no {what} files{reasons}; name a folder or file that does"
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


def locate(where: str) -> Path:
    """The path that is written, with `~` expanded.

    Raises:
        CorpusError: the system knows no such user, or takes no such name.
    """
    try:
        path = Path(where).expanduser()
        path.exists()
    except (OSError, RuntimeError) as error:
        raise CorpusError(f"path {where!r} is none ({summarize_error(error)}); give another") from (
            error
        )
    return path


def expand_pattern(pattern: Path) -> tuple[Path, list[Path]]:
    """The fixed part of a shell pattern, and what it matches but folders, sorted.

    As a shell does, `*` and `**` pass over hidden names; `**` follows no link, and so ends.
    """
    fixed = Path(*itertools.takewhile(lambda part: not glob.has_magic(part), pattern.parts))
    rest = [
        part if part == "**" else re.sub(r"\*+", "*", part)
        for part in pattern.parts[len(fixed.parts) :]
    ]
    if rest[-1] == "**":
        rest.append("*")  # by itself it stands for folders
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
    path = locate(where)
    if not path.is_dir():
        raise explain_missing(path, where)
    folders = sorted(
        p for p in path.iterdir() if p.is_dir() and not p.name.startswith((".", _BYTE_CODE))
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
        f"{find_nearest(path.name, sorted(clean_name(p.name) for p in above.iterdir()))}"
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
