"""Books: plain text, R data (Austen), and a SWORD module (Spurgeon's commentary on the psalms)."""

from __future__ import annotations

import html
import re
from pathlib import Path, PurePosixPath

from memorizing.errors import CorpusError
from standins.archives import read_members
from standins.r_data import read_lazy_data
from standins.sword import read_chapters
from standins.texts import Documents, decode_lines, keep_long, name_file

_AUTHORS_ELSEWHERE = ("austen-", "milton-", "shakespeare-")
_R_DATA = ("data/Rdata.rdx", "data/Rdata.rdb")
_NUM_PSALMS = 150


def read_gutenberg(package: str, path: Path) -> Documents:
    """Books of Project Gutenberg, without authors of whom another package has more."""
    for name, raw in read_members(path, lambda name: name.endswith(".txt")).items():
        book = PurePosixPath(name).stem
        if "/gutenberg/" in name and not book.startswith(_AUTHORS_ELSEWHERE):
            yield from keep_long(name_file("ng", book), decode_lines(raw))


def read_shakespeare(package: str, path: Path) -> Documents:
    """Shakespeare and Milton from Project Gutenberg; the First Folio's spelling is left out."""
    wanted = re.compile(r".*data/(texts/.*_gut|ancillary/britannica-11th)\.txt")
    for name, raw in read_members(path, lambda name: bool(wanted.fullmatch(name))).items():
        yield from keep_long(name_file("shk", PurePosixPath(name).stem), decode_lines(raw))


def read_austen(package: str, path: Path) -> Documents:
    """Austen's novels: R character vectors, a line each.

    Raises:
        CorpusError: the package has no data of R, or in a format of R that this cannot read.
    """
    members = read_members(path, lambda name: name.endswith(_R_DATA))
    by_ending = {name.rsplit(".", 1)[1]: raw for name, raw in members.items()}
    if set(by_ending) != {"rdx", "rdb"}:
        raise CorpusError(f"package {path.name!r} lacks {' or '.join(_R_DATA)}")
    for novel, lines in read_lazy_data(by_ending["rdx"], by_ending["rdb"]).items():
        yield from keep_long(f"austen_{novel}.txt", "\n".join(lines) + "\n")


def read_psalms(package: str, path: Path) -> Documents:
    """The commentary, a document per psalm; the markup (OSIS) becomes lines."""
    for psalm, raw in read_chapters(path, "Ps", _NUM_PSALMS).items():
        text = re.sub(r"<div[^>]*eID[^>]*>", "\n", raw.decode("utf-8", errors="replace"))
        text = html.unescape(re.sub(r"<[^>]+>", "", text))
        text = re.sub(r"\n{3,}", "\n\n", re.sub(r"[ \t]+", " ", text)).strip() + "\n"
        yield from keep_long(f"tdavid_psalm_{psalm:03d}.txt", text)
