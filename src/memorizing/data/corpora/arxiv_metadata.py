"""Which arXiv papers are Mathematics, from arXiv's public metadata."""

from __future__ import annotations

import gzip
import io
import json
import zipfile
import zlib
from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from memorizing.data.corpora.sources import ARXIV
from memorizing.data.corpus import summarize_error
from memorizing.data.reading.archives import read_lines
from memorizing.data.text import ReadLog
from memorizing.errors import CorpusError

PATTERN = "arxiv-metadata*.json*"
_SUBSUMED = frozenset({"math-ph", "alg-geom", "dg-ga", "funct-an", "q-alg"})
_BAD_LINES_NAMED = 10


def is_mathematics(categories: str) -> bool:
    """Whether a paper is labelled Mathematics: by its primary category, which is listed first.

    Those are `math.*`, `math-ph` (the same as math.MP), and the archives of the 1990s that have
    become part of Mathematics: alg-geom, dg-ga, funct-an and q-alg. Papers that are only
    cross-listed there are not meant.

    Args:
        categories: as arXiv writes them, with spaces between: `math.AG hep-th`.
    """
    primary = categories.split()[:1]
    return bool(primary) and (primary[0].startswith("math.") or primary[0] in _SUBSUMED)


def find_metadata(folder: Path) -> Path:
    """ArXiv's metadata in a folder: `arxiv-metadata-oai-snapshot.json`, as it is, .gz or .zip.

    Raises:
        CorpusError: there is none.
    """
    found = sorted([*folder.glob(PATTERN), *folder.glob("arxiv-metadata*.zip")])
    archives = sorted(folder.glob("archive.zip"))  # what Kaggle calls it
    if not found and not archives:
        raise CorpusError(
            f"folder {str(folder)!r} has no arxiv-metadata-oai-snapshot.json (or .gz, .zip), which "
            f"says which papers are Mathematics; {ARXIV}"
        )
    return (found or archives)[0]


def read_mathematics(path: Path, log: ReadLog) -> set[str]:
    """Identifiers of all papers on Mathematics, without the slash of the old ones.

    `math/0211159` is `math0211159`, as the files of the bulk archives are named.

    Raises:
        CorpusError: the file is damaged, or has no such papers: it would give an empty corpus.
        UnsafeArchiveError: it expands too far, or has a line that is far too long for a paper.
    """
    identifiers: set[str] = set()
    num_bad = 0
    try:
        with ExitStack() as stack:
            for number, line in enumerate(_open(path, stack), start=1):
                try:
                    paper = json.loads(line)
                    identifier, categories = str(paper["id"]), str(paper["categories"])
                except (ValueError, KeyError, TypeError, RecursionError):
                    if line.strip():
                        num_bad += 1
                        _note_bad_line(path.name, number, num_bad, log)
                    continue
                if is_mathematics(categories):
                    identifiers.add(identifier.replace("/", ""))
    except (OSError, EOFError, zlib.error, zipfile.BadZipFile, NotImplementedError) as error:
        raise CorpusError(
            f"cannot read {path.name!r} to its end ({summarize_error(error)}); download it again"
        ) from error
    if not identifiers:
        raise CorpusError(
            f"{path.name!r} has no papers on Mathematics; give arXiv's metadata as JSON lines with "
            "id and categories"
        )
    return identifiers


def _note_bad_line(name: str, number: int, num_bad: int, log: ReadLog) -> None:
    # A damaged file may have millions of them: the first are named, the others counted.
    if num_bad <= _BAD_LINES_NAMED:
        log.skip(f"{name}:{number}", "not a paper's id and categories")
    else:
        log.pass_over(f"more lines of {name} that are not a paper's id and categories")


def _open(path: Path, stack: ExitStack) -> Iterable[bytes]:
    """The lines of the metadata, closed with `stack`."""
    stream: Any
    if path.suffix == ".zip":
        stream = io.BufferedReader(_open_zip(path, stack))
    else:
        stream = gzip.GzipFile(path) if path.suffix == ".gz" else path.open("rb")
    return read_lines(stack.enter_context(stream), path.stat().st_size, path.name)


def _open_zip(path: Path, stack: ExitStack) -> Any:
    archive = stack.enter_context(zipfile.ZipFile(path))
    members = [member for member in archive.infolist() if member.filename.endswith(".json")]
    if not members:
        raise zipfile.BadZipFile("it holds no .json file")
    if members[0].flag_bits & 1:
        raise zipfile.BadZipFile(f"its {members[0].filename!r} is encrypted")
    # The others expand a block of their input at once, however large that becomes.
    if members[0].compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise zipfile.BadZipFile(f"its {members[0].filename!r} is not compressed by deflate")
    return archive.open(members[0])
