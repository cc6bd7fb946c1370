"""Papers on Mathematics as LaTeX: arXiv's bulk archives, or a dataset of rows."""

from __future__ import annotations

import contextlib
import json
import posixpath
import re
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath

from memorizing.config import DataConfig
from memorizing.data.corpora.spill import SpillStore
from memorizing.data.corpus import Corpus
from memorizing.data.reading.archives import (
    READ_ERRORS,
    UnsafeArchiveError,
    check_archive,
    open_packed,
    read_lines,
    read_members,
    read_packed,
)
from memorizing.data.reading.files import explain_missing, is_plain, locate
from memorizing.data.reading.tables import find_rows, find_text, find_value, read_rows
from memorizing.data.text import (
    Document,
    ReadLog,
    concatenate_texts,
    make_document,
    summarize_error,
)
from memorizing.errors import CorpusError

ARXIV_SOURCE = (
    "arXiv's sources are about 3 TB: files arXiv_src_YYMM_NNN.tar (500 MB each) of the bucket "
    "s3://arxiv/src, whose downloads are paid by the reader, and in the same folder "
    "arxiv-metadata-oai-snapshot.json from kaggle.com/datasets/Cornell-University/arxiv (1.5 GB "
    "zipped). Or write arxiv for the papers on Mathematics up to 2022 in "
    "hoskinson-center/proof-pile on the hub (10 GB, gathered on disk first)"
)
HUB_DATASET = "hoskinson-center/proof-pile"
_HUB_PATTERNS = ("dev/*.jsonl.gz", "test/*.jsonl.gz", "train/*.jsonl.gz")
_NAME_COLUMNS = ("arxiv_id", "id", "paper_id")
_CATEGORY_COLUMNS = ("primary_category", "categories")
_TEX_HEADER = "% {}\n"
_PILE_FILE = re.compile(r"(?P<paper>[^/]+)/(?:v(?P<version>\d+)[^/]*/)?(?P<path>.+)", re.DOTALL)
_NOT_TEX = (b"%!PS", b"%PDF", b"<!DOCTYPE", b"<html", b"\x1f\x8b", b"PK\x03\x04")
_WITHDRAWN = b"%auto-ignore"
_TEX_SIGN = re.compile(rb"\\(?:document(?:class|style)|begin\s*\{|bye\b|magnification|input\b)")


def open_arxiv(where: str, config: DataConfig) -> Corpus:
    """`arxiv:PATH`: a document per paper whose primary category is Mathematics.

    PATH is a folder with bulk archives as downloaded (`arXiv_src_YYMM_NNN.tar`) and arXiv's
    metadata. A paper of several LaTeX files has its main file first, then what that brings in, each
    after a line `% path`; figures, styles and bibliographies are left out. Or PATH holds files of
    rows; or it is `hub`, the arXiv part of proof-pile (Azerbayev et al. 2022), or
    `hub:OWNER/NAME[/PATTERN]`. A row is a paper (text in `data.text_column`, taken if it has no
    category or is Mathematics), or, where it has a column `meta` with `config` and `file` as in
    proof-pile, a file of a paper: those are gathered in a temporary file on disk first, and the
    last version of a paper is taken.

    Raises:
        CorpusError: the path or its metadata is missing; the hub cannot be reached; while reading:
            a bulk archive has members that leave their folder, or devices. A single paper that
            has such is left out, and named.
    """
    found, path = ReadLog(), locate(where)
    is_local = where.partition(":")[0] != "hub"
    if is_local and not path.exists():
        raise CorpusError(f"{explain_missing(path, where)}; {ARXIV_SOURCE}")
    archives = [
        archive
        for archive in (sorted(path.rglob("*.tar")) if is_local and path.is_dir() else ())
        if is_plain(archive, str(archive), found)
    ]
    if not archives:
        files = find_rows(where, found, ARXIV_SOURCE, HUB_DATASET, _HUB_PATTERNS)
        return _open_rows(where, files, config, found)
    metadata = find_metadata(path)

    def read(log: ReadLog) -> Iterator[Document | None]:
        identifiers = read_mathematics(metadata, log)
        seen: set[str] = set()
        for archive in archives:
            yield from _read_archive(archive, identifiers, seen, log)

    description = f"arxiv:{where}, {len(archives)} bulk archives, Mathematics"
    return Corpus(description, read, found=found)


def _read_archive(
    archive: Path, identifiers: set[str], seen: set[str], log: ReadLog
) -> Iterator[Document | None]:
    # What stands before damage is read below, and the damage noted there.
    with contextlib.suppress(*READ_ERRORS):
        check_archive(archive)
    try:
        for path, raw in read_members(archive, lambda name: name.lower().endswith((".gz", ".pdf"))):
            if path.suffix.lower() == ".pdf":
                log.pass_over("papers without LaTeX source")
            elif path.stem not in identifiers:
                log.pass_over("papers that are not Mathematics")
            elif path.stem in seen:
                log.skip(f"{path} in {archive.name}", "the paper was there before")
            else:
                seen.add(path.stem)
                yield _read_paper(path.stem, raw, log)
    except READ_ERRORS as error:
        log.skip(archive.name, f"cannot be read to its end ({summarize_error(error)})")


def _read_paper(name: str, raw: bytes, log: ReadLog) -> Document | None:
    try:
        content = read_packed(raw, f"{name}.gz", _may_be_tex)
    except UnsafeArchiveError as error:
        log.skip(name, str(error))
        return None
    except READ_ERRORS as error:
        # Programs that download unpack a file and leave its name.
        if raw.startswith(b"\x1f\x8b") or not _TEX_SIGN.search(raw):
            log.skip(name, f"cannot be read ({summarize_error(error)})")
            return None
        content = raw
    if isinstance(content, bytes):
        if content.startswith(_NOT_TEX):
            log.pass_over("papers without LaTeX source")
            return None
        if content.lstrip().startswith(_WITHDRAWN):
            log.pass_over("papers that were withdrawn")
            return None
        return make_document(name, content, log)
    texts = {str(path): text for path, text in content.items()}
    # Some sources have another suffix, or none: taken where there is nothing else.
    named = {path: raw for path, raw in texts.items() if path.lower().endswith(TEX_SUFFIXES)}
    files = named or {path: raw for path, raw in texts.items() if _TEX_SIGN.search(raw)}
    if not files:
        log.pass_over("papers without LaTeX source")
        return None
    return _join_paper(name, files, log)


def _may_be_tex(name: str) -> bool:
    suffix = PurePosixPath(name).suffix.lower()
    return suffix in (*TEX_SUFFIXES, ".txt", "") or suffix[1:].isdigit()


def _join_paper(name: str, files: dict[str, bytes], log: ReadLog) -> Document | None:
    if len(files) == 1:
        return make_document(name, next(iter(files.values())), log)
    texts = {path: raw.decode("utf-8", "replace") for path, raw in files.items()}
    ordered = ((path, files[path]) for path in order_sources(texts))
    return concatenate_texts(name, ordered, log, header=_TEX_HEADER)


def _open_rows(where: str, files: Mapping[str, str], config: DataConfig, found: ReadLog) -> Corpus:
    def read(log: ReadLog) -> Iterator[Document | None]:
        with SpillStore() as store:
            for row in read_rows(files, log, remedy=ARXIV_SOURCE):
                meta = row.values.get("meta")
                raw = find_text(row, (config.text_column,))
                if isinstance(meta, dict) and "file" in meta:
                    _gather(meta, raw, store, log)
                    continue
                categories = find_value(row, _CATEGORY_COLUMNS)
                name = find_value(row, _NAME_COLUMNS) or f"{row.file}:{row.number}"
                if categories and not is_mathematics(categories.strip("[]'\" ").replace("'", "")):
                    log.pass_over("papers that are not Mathematics")
                else:
                    yield make_document(name, raw, log)
            for paper in store.list_groups():
                texts = store.list_texts(paper)
                last = max(name.partition("/")[0] for name in texts)
                newest = {
                    name.partition("/")[2]: store.read(place)
                    for name, place in texts.items()
                    if name.startswith(f"{last}/")
                }
                yield _join_paper(paper, newest, log)

    return Corpus(f"arxiv:{where}, {len(files)} files of rows", read, found=found)


def _gather(meta: dict[str, object], raw: bytes, store: SpillStore, log: ReadLog) -> None:
    match = _PILE_FILE.fullmatch(str(meta["file"]))
    if meta.get("config") != "arxiv":
        log.pass_over("rows that are not papers of arXiv")
    elif match is None:
        log.skip(str(meta["file"]), "not the path of a paper's file")
    elif raw:
        path = str(PurePosixPath(match["path"]))
        store.add(match["paper"], f"{int(match['version'] or 1):04d}/{path}", raw)


TEX_SUFFIXES = (".tex", ".ltx", ".latex")

_COMMENT = re.compile(r"(?<!\\)((?:\\\\)*)%.*")
"""After an even number of backslashes: each pair is one that is written."""
_INPUT = re.compile(
    r"\\(?:input|include|subfile|subfileinclude)\s*(?:\{(?P<braced>[^{}]+)\}"
    r"|\s(?P<bare>[\w./-]+))"
    r"|\\(?:sub)?(?:import|inputfrom|includefrom)\*?\s*\{(?P<folder>[^{}]*)\}"
    r"\s*\{(?P<file>[^{}]+)\}"
)
_CLASS = re.compile(r"\\document(?:class|style)\b")
_BODY = re.compile(r"\\begin\s*\{document\}")
_MAIN_NAMES = ("main", "ms", "paper", "article", "root")


def order_sources(files: Mapping[str, str]) -> list[str]:
    r"""The main file, the files it brings in by `\input` or `\include`, then all others.

    Each file comes once and whole, where it is first brought in (so what stands after an `\input`
    in the main file precedes the file that is brought in). Commented lines do not count.

    Args:
        files: path in the paper's folder -> text.

    Returns:
        Paths. The main file is the one with a document class and body that no other brings in;
        among several, one named as main files are, then the longest; plain TeX has the longest.
    """
    texts = {path: _COMMENT.sub(r"\1", text) for path, text in files.items()}
    inputs = {path: _find_inputs(path, text, files) for path, text in texts.items()}
    brought = {needed for found in inputs.values() for needed in found}

    def rank(path: str) -> tuple[bool, bool, bool, bool, int, str]:
        stem = posixpath.splitext(posixpath.basename(path))[0].lower()
        return (
            not _CLASS.search(texts[path]),
            not _BODY.search(texts[path]),
            path in brought,
            stem not in _MAIN_NAMES,
            -len(texts[path]),
            path,
        )

    ordered: dict[str, None] = {}
    roots = sorted(files, key=rank)[:1] + sorted(files)
    for root in roots:
        waiting = [root]
        while waiting:
            path = waiting.pop()
            if path not in ordered:
                ordered[path] = None
                waiting.extend(reversed(inputs[path]))
    return list(ordered)


def _find_inputs(path: str, text: str, files: Mapping[str, str]) -> list[str]:
    """Files that one brings in, in its order; those that are not there are passed over."""
    folder = posixpath.dirname(path)
    found = []
    for match in _INPUT.finditer(text):
        written = match["braced"] or match["bare"] or match["file"]
        if match["file"]:
            written = posixpath.join(match["folder"].strip(), written.strip())
        # Paths are relative to the folder that LaTeX runs in: the paper's, or the main file's.
        for base in dict.fromkeys(("", folder)):
            plain = posixpath.normpath(posixpath.join(base, written.strip().strip('"')))
            name = next(
                (n for n in (plain, *(plain + s for s in TEX_SUFFIXES)) if n in files), None
            )
            if name is not None:
                found.append(name)
                break
    return found


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
    # Kaggle calls it archive.zip.
    patterns = ("arxiv-metadata*.json*", "arxiv-metadata*.zip", "archive.zip")
    found = [path for pattern in patterns for path in sorted(folder.glob(pattern))]
    if not found:
        raise CorpusError(
            f"folder {str(folder)!r} has no arxiv-metadata-oai-snapshot.json (or .gz, .zip), which "
            f"says which papers are Mathematics; {ARXIV_SOURCE}"
        )
    return found[0]


def read_mathematics(path: Path, log: ReadLog) -> set[str]:
    """Identifiers of all papers on Mathematics, without the slash of the old ones.

    `math/0211159` is `math0211159`, as the files of the bulk archives are named.

    Raises:
        CorpusError: the file is damaged, or has no such papers: it would give an empty corpus.
        UnsafeArchiveError: it expands too far, or has a line that is far too long for a paper.
    """
    identifiers: set[str] = set()
    num_bad, problem = 0, "not a paper's id and categories"
    try:
        with open_packed(path) as stream:
            lines = read_lines(stream, path.stat().st_size, path.name)
            for number, line in enumerate(lines, start=1):
                if not line.strip():
                    continue
                try:
                    paper = json.loads(line)
                    identifier, categories = str(paper["id"]), str(paper["categories"])
                except (ValueError, KeyError, TypeError, RecursionError):
                    num_bad += 1
                    # A damaged file may have millions: the first are named, the others counted.
                    if num_bad <= _BAD_LINES_NAMED:
                        log.skip(f"{path.name}:{number}", problem)
                    else:
                        log.pass_over(f"more lines of {path.name} that are {problem}")
                    continue
                if is_mathematics(categories):
                    identifiers.add(identifier.replace("/", ""))
    except READ_ERRORS as error:
        raise CorpusError(
            f"cannot read {path.name!r} to its end ({summarize_error(error)}); download it again"
        ) from error
    if not identifiers:
        raise CorpusError(
            f"{path.name!r} has no papers on Mathematics; give arXiv's metadata as JSON lines with "
            "id and categories"
        )
    return identifiers
