"""From bytes on disk to documents, with a log of what was left out or replaced."""

from __future__ import annotations

import errno
import os
import re
import stat
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from memorizing.errors import ResourceError
from memorizing.storage.files import describe_failure
from memorizing.storage.files import read_bytes as read_plain

_IGNORED_FOLDERS = frozenset({"__pycache__"})
_BINARY_PROBE = 8192
MAX_FILE_BYTES = 2**31
"""Larger files are no text that somebody wrote, and are left out."""
_SURROGATE = re.compile("[\ud800-\udfff]")


@dataclass(frozen=True)
class Document:
    """A text that is read from its beginning to its end, with a memory of its own."""

    name: str
    text: str
    num_bytes: int = -1
    """Bytes of the raw text as it was read, before undecodable bytes were replaced; -1 counts
    `text` as UTF-8."""

    def __post_init__(self) -> None:
        """Make name and text what UTF-8 can hold; count the bytes where the reader did not."""
        object.__setattr__(self, "name", clean_name(self.name))
        object.__setattr__(self, "text", clean_text(self.text))
        if self.num_bytes < 0:
            object.__setattr__(self, "num_bytes", len(self.text.encode()))


@dataclass
class ReadLog:
    """What a corpus left out or changed while it was read."""

    skipped: list[str] = field(default_factory=list)
    """One line per thing left out: its name and why."""
    num_replaced: int = 0
    """Files (or rows) in which bytes that are not UTF-8 were replaced by U+FFFD."""
    num_passed_over: Counter[str] = field(default_factory=Counter)
    """What was left out by rule, such as papers of another field: how many, by the reason."""

    def skip(self, name: str, reason: str) -> None:
        """Note that something was left out."""
        self.skipped.append(clean_name(f"{name}: {reason}"))

    def pass_over(self, reason: str) -> None:
        """Count something that a rule leaves out; there may be millions."""
        self.num_passed_over[reason] += 1


def clean_name(name: str) -> str:
    r"""A name that UTF-8 can hold; bytes of a file name that it cannot become `\udcNN`."""
    return name.encode("utf-8", "backslashreplace").decode()


def explain_unreadable(error: OSError) -> str:
    """Why a file cannot be read, for a note.

    Raises:
        ResourceError: too many files are open: going on would leave out the rest as well.
    """
    reason = describe_failure(error)
    if error.errno in (errno.EMFILE, errno.ENFILE):
        raise ResourceError(f"cannot go on reading: {reason}") from error
    return f"cannot be read ({reason})"


def decode_text(raw: bytes, log: ReadLog) -> str:
    """UTF-8 text of `raw`; bytes that are not UTF-8 become U+FFFD and are counted in `log`."""
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError:
        log.num_replaced += 1
        return raw.decode("utf-8", errors="replace")


def encode_text(text: str) -> bytes:
    """The bytes a string stands for.

    A lone surrogate is a byte that was escaped while decoding, or else is written as such; either
    is not UTF-8 and is replaced when the bytes are decoded.
    """
    try:
        return text.encode("utf-8", errors="surrogateescape")
    except UnicodeEncodeError:
        return text.encode("utf-8", errors="surrogatepass")


def clean_text(text: str) -> str:
    """A text without surrogates that stand alone, which UTF-8 cannot hold: U+FFFD for each."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return _SURROGATE.sub("\ufffd", text)
    return text


def make_document(name: str, raw: bytes, log: ReadLog) -> Document | None:
    """A document from raw bytes; None, noted in `log`, where there is only white space."""
    text = decode_text(raw, log)
    if not text.strip():
        log.skip(name, "no text")
        return None
    return Document(name, text, len(raw))


def is_binary(raw: bytes) -> bool:
    """Whether bytes are not text, told as git does: by a zero byte near the beginning."""
    return b"\0" in raw[:_BINARY_PROBE]


def find_files(
    root: Path,
    log: ReadLog,
    *,
    keep: Callable[[str], bool] = lambda name: True,
    ignored_folders: Iterable[str] = (),
) -> list[PurePosixPath]:
    """Files under `root`, relative to it, sorted.

    Hidden ones and byte code are left out, and what is no plain file; links to folders are not
    followed.
    """
    ignored = _IGNORED_FOLDERS.union(ignored_folders)
    found: list[PurePosixPath] = []

    def note(error: OSError) -> None:
        log.skip(str(error.filename), explain_unreadable(error))

    for folder, folders, files in os.walk(root, onerror=note):
        folders[:] = [name for name in folders if name not in ignored and not name.startswith(".")]
        base = PurePosixPath(Path(folder).relative_to(root).as_posix())
        found.extend(base / name for name in files if not name.startswith(".") and keep(name))
    return [name for name in sorted(found) if is_plain(root / name, str(name), log)]


def is_plain(path: Path, name: str, log: ReadLog) -> bool:
    """Whether there is a file to read, also behind a link; otherwise it is noted in `log`."""
    try:
        if stat.S_ISREG(path.stat().st_mode):
            return True
        log.skip(name, "no plain file")
    except OSError as error:
        log.skip(name, explain_unreadable(error))
    return False


def read_bytes(path: Path, name: str, log: ReadLog) -> bytes | None:
    """Bytes of a text file, or None, noted in `log`, where it is binary or cannot be read."""
    try:
        raw = read_plain(path, most=MAX_FILE_BYTES)
    except OSError as error:
        log.skip(name, explain_unreadable(error))
        return None
    if is_binary(raw):
        log.skip(name, "binary")
        return None
    return raw


def concatenate_files(
    name: str, files: Iterable[tuple[PurePosixPath, Path]], log: ReadLog
) -> Document | None:
    """One document of many files in the order given, each after a line `# path/inside/it.py`.

    As `concatenate_texts`; files that are binary or cannot be read are noted in `log`.
    """
    contents = ((shown, read_bytes(path, f"{shown} in {name}", log)) for shown, path in files)
    return concatenate_texts(name, contents, log)


def concatenate_texts(
    name: str,
    files: Iterable[tuple[PurePosixPath | str, bytes | None]],
    log: ReadLog,
    header: str = "# {}\n",
) -> Document | None:
    """One document of many files in the order given, each after a line with its path.

    The document's bytes are those of the files as they were read, plus the path lines and the line
    ends added. Files that are empty or None are passed over. Returns None, noted in `log`, where no
    file has text.

    Args:
        name: of the document.
        files: path and content of each.
        log: where bytes that are not UTF-8 are counted.
        header: the line before a file, a comment of its language, with the path for `{}`.
    """
    texts: list[str] = []
    num_bytes = 0
    for shown, raw in files:
        if not raw or raw.isspace():
            continue
        line = encode_text(header.format(shown))
        end = "" if raw.endswith(b"\n") else "\n"
        texts += [line.decode("utf-8", errors="replace"), decode_text(raw, log), end]
        num_bytes += len(line) + len(raw) + len(end)
    if not texts:
        log.skip(name, "no text")
        return None
    return Document(name, "".join(texts), num_bytes)
