"""From bytes to documents, with a log of what was left out or replaced; random orders of names."""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import PurePosixPath

_SURROGATE = re.compile("[\ud800-\udfff]")
_BINARY_PROBE = 8192


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
    """What was left out or changed while texts were read."""

    items: list[tuple[str, str]] = field(default_factory=list)
    """Name and reason of each thing that was left out, in order."""
    num_replaced: int = 0
    """Files (or rows) in which bytes that are not UTF-8 were replaced by U+FFFD."""
    num_passed_over: Counter[str] = field(default_factory=Counter)
    """What was left out by rule, such as papers of another field: how many, by the reason."""

    def skip(self, name: str, reason: str) -> None:
        """Note that something was left out."""
        self.items.append((clean_name(name), clean_name(reason)))

    def pass_over(self, reason: str) -> None:
        """Count something that a rule leaves out; there may be millions."""
        self.num_passed_over[reason] += 1

    @property
    def lines(self) -> list[str]:
        """What was left out and why, a line each; what a rule leaves out is one line together."""
        return [
            *(f"{name}: {reason}" for name, reason in self.items),
            *(f"{count:,} {reason}" for reason, count in self.num_passed_over.items()),
        ]

    def describe(self) -> str:
        """How many and why, the most frequent reason first; empty where there is none."""
        counts = Counter(reason for _, reason in self.items)
        return ", ".join(f"{count:,} {reason}" for reason, count in counts.most_common())


def clean_name(name: str) -> str:
    r"""A name that UTF-8 can hold; bytes of a file name that it cannot become `\udcNN`."""
    return name.encode("utf-8", "backslashreplace").decode()


def clean_text(text: str) -> str:
    """A text without surrogates that stand alone, which UTF-8 cannot hold: U+FFFD for each."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return _SURROGATE.sub("\ufffd", text)
    return text


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


def drop_binary(name: str, raw: bytes, log: ReadLog) -> bytes | None:
    """The bytes, or None, noted in `log`, where they are no text.

    That is told as git does: by a zero byte near the beginning.
    """
    if b"\0" in raw[:_BINARY_PROBE]:
        log.skip(name, "binary")
        return None
    return raw


def make_document(name: str, raw: bytes, log: ReadLog) -> Document | None:
    """A document from raw bytes; None, noted in `log`, where there is only white space."""
    text = decode_text(raw, log)
    if not text.strip():
        log.skip(name, "no text")
        return None
    return Document(name, text, len(raw))


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


def summarize_error(error: BaseException) -> str:
    """The first line of another library's error, for a message of one line."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def hash_name(name: str, seed: int | str = "") -> int:
    """64 bits that are uniform over names: the start of SHA-256 of the seed and the name.

    An order by it is the same with every Python and numpy, and adding a name leaves the order of
    the others as it was.
    """
    digest = hashlib.sha256(f"{seed}\0{name}".encode("utf-8", errors="surrogatepass")).digest()
    return int.from_bytes(digest[:8], "big")


def shuffle_names(names: Iterable[str], seed: int | str) -> list[str]:
    """The names in an order that is random in `seed` and independent of the order given."""
    return sorted(names, key=lambda name: (hash_name(name, seed), name))


def shuffle_tree(paths: Iterable[PurePosixPath], seed: int | str) -> list[PurePosixPath]:
    """Files of a directory tree in the paper's order (section 4.1, GitHub).

    The tree is walked with the entries of each directory in random order, so that every
    subdirectory is kept together at every level.
    """

    def key(path: PurePosixPath) -> tuple[int, ...]:
        parts = path.parts
        return tuple(hash_name("/".join(parts[: i + 1]), seed) for i in range(len(parts)))

    return sorted(sorted(paths), key=key)
