"""Packages whose files are documents as they are: Python source, LaTeX; and what readers share."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from memorizing.errors import CorpusError
from standins.archives import read_members, unpack_gzip

Documents = Iterator[tuple[str, bytes]]
"""Paths in the family's folder, and contents."""

MIN_BYTES = 16 * 1024
"""Shorter documents are left out: too little to remember."""
MIN_VIGNETTE_BYTES = 8 * 1024


def decode_lines(raw: bytes) -> str:
    """Text with every line ended by a line feed; what is not UTF-8 becomes U+FFFD."""
    return raw.decode("utf-8", errors="replace").replace("\r\n", "\n").replace("\r", "\n")


def name_file(prefix: str, title: str) -> str:
    """A file name that every system takes: `enwiki_Abraham_Lincoln.txt`."""
    plain = re.sub(r"[^\w.-]", "_", title)
    return f"{prefix}_{plain}.txt"


def keep_long(name: str, text: str, min_bytes: int = MIN_BYTES) -> Documents:
    """The document, unless it is short."""
    raw = text.encode("utf-8")
    if len(raw) >= min_bytes:
        yield name, raw


def read_python(package: str, path: Path) -> Documents:
    """All .py files of a wheel, byte for byte, in a folder of the package's name."""
    folder = package.replace("-", "_")
    for name, raw in read_members(path, lambda name: name.endswith(".py")).items():
        yield f"{folder}/{name}", raw


def read_tex(package: str, path: Path) -> Documents:
    """LaTeX sources in a Debian package, those that Debian has compressed included."""
    return _read_sources(package, path, (".tex", ".tex.gz"), MIN_BYTES)


def read_vignettes(package: str, path: Path) -> Documents:
    """Vignettes of an R package (LaTeX with R); of two of one name the last in order of paths."""
    return _read_sources(package, path, (".rnw", ".rnw.gz"), MIN_VIGNETTE_BYTES)


def read_stacks(checkout: Path) -> Documents:
    """The chapters of a checkout of the Stacks project, byte for byte.

    Raises:
        CorpusError: the folder is none.
    """
    chapters = sorted(checkout.glob("*.tex"))
    if not (checkout / "algebra.tex").is_file():
        raise CorpusError(
            f"{str(checkout)!r} is no checkout of the Stacks project: it has no algebra.tex; give "
            "the folder that has"
        )
    for chapter in chapters:
        yield f"stacks-project/{chapter.name}", chapter.read_bytes()


def _read_sources(package: str, path: Path, suffixes: tuple[str, ...], min_bytes: int) -> Documents:
    members = read_members(path, lambda name: name.lower().endswith(suffixes))
    texts: dict[str, str] = {}
    for name, raw in members.items():
        shown = PurePosixPath(name).name
        if shown.endswith(".gz"):
            shown, raw = shown.removesuffix(".gz"), unpack_gzip(raw, name)
        texts[name_file(package, shown)] = decode_lines(raw)
    for shown, text in texts.items():
        yield from keep_long(shown, text, min_bytes)
