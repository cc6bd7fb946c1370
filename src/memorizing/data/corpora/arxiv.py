"""Papers on Mathematics as LaTeX: arXiv's bulk archives, or a dataset of rows."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from memorizing.config import DataConfig
from memorizing.data.batch import Document
from memorizing.data.corpora.arxiv_metadata import find_metadata, is_mathematics, read_mathematics
from memorizing.data.corpora.latex import TEX_SUFFIXES, order_sources
from memorizing.data.corpora.sources import ARXIV
from memorizing.data.corpora.spill import SpillStore
from memorizing.data.corpus import Corpus, summarize_error
from memorizing.data.reading.archives import (
    READ_ERRORS,
    UnsafeArchiveError,
    check_archive,
    read_members,
    read_packed,
)
from memorizing.data.reading.places import explain_missing
from memorizing.data.reading.tables import (
    RowFiles,
    find_hub_files,
    find_row_files,
    find_text,
    find_value,
    parse_hub_place,
    read_rows,
)
from memorizing.data.text import ReadLog, concatenate_texts, encode_text, make_document
from memorizing.errors import CorpusError

HUB_DATASET = "hoskinson-center/proof-pile"
_HUB_PATTERNS = ("dev/*.jsonl.gz", "test/*.jsonl.gz", "train/*.jsonl.gz")
_NAME_COLUMNS = ("arxiv_id", "id", "paper_id")
_CATEGORY_COLUMNS = ("primary_category", "categories")
_TEX_HEADER = "% {}\n"
_PILE_FILE = re.compile(r"(?P<paper>[^/]+)/(?:v(?P<version>\d+)[^/]*/)?(?P<path>.+)", re.DOTALL)
_NOT_TEX = (b"%!PS", b"%PDF", b"<!DOCTYPE", b"<html", b"\x1f\x8b", b"PK\x03\x04")
_WITHDRAWN = b"%auto-ignore"


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
            a bulk archive has members that leave their folder, or links. A single paper that
            has such is left out, and named.
    """
    place_log = ReadLog()
    kind, _, dataset = where.partition(":")
    path = Path(where).expanduser()
    if kind == "hub":
        name, pattern = parse_hub_place(dataset) if dataset else (HUB_DATASET, "")
        patterns = [pattern] if pattern else _HUB_PATTERNS
        return _open_rows(where, find_hub_files(name, patterns, ARXIV), config, place_log)
    if not path.exists():
        raise CorpusError(f"{explain_missing(path, where)}; {ARXIV}")
    archives = sorted(path.rglob("*.tar")) if path.is_dir() else []
    if not archives:
        return _open_rows(where, find_row_files(where, place_log, ARXIV), config, place_log)
    metadata = find_metadata(path)

    def read(log: ReadLog) -> Iterator[Document]:
        identifiers = read_mathematics(metadata, log)
        for archive in archives:
            yield from _read_archive(archive, identifiers, log)

    return Corpus(f"arxiv:{where}, {len(archives)} bulk archives, Mathematics", read)


def _read_archive(archive: Path, identifiers: set[str], log: ReadLog) -> Iterator[Document]:
    # What stands before damage is read below, and the damage noted there.
    with contextlib.suppress(*READ_ERRORS):
        check_archive(archive)
    try:
        for path, raw in read_members(archive, (".gz", ".pdf")):
            if path.suffix.lower() == ".pdf":
                log.pass_over("papers without LaTeX source")
            elif path.stem not in identifiers:
                log.pass_over("papers that are not Mathematics")
            else:
                document = _read_paper(path.stem, raw, log)
                if document is not None:
                    yield document
    except READ_ERRORS as error:
        log.skip(archive.name, f"cannot be read to its end ({summarize_error(error)})")


def _read_paper(name: str, raw: bytes, log: ReadLog) -> Document | None:
    try:
        content = read_packed(raw, f"{name}.gz", TEX_SUFFIXES)
    except UnsafeArchiveError as error:
        log.skip(name, str(error))
        return None
    except READ_ERRORS as error:
        log.skip(name, f"cannot be read ({summarize_error(error)})")
        return None
    if isinstance(content, bytes):
        if content.startswith(_NOT_TEX):
            log.pass_over("papers without LaTeX source")
            return None
        if content.lstrip().startswith(_WITHDRAWN):
            log.pass_over("papers that were withdrawn")
            return None
        return make_document(name, content, log)
    if not content:
        log.pass_over("papers without LaTeX source")
        return None
    return _join_paper(name, {str(path): text for path, text in content.items()}, log)


def _join_paper(name: str, files: dict[str, bytes], log: ReadLog) -> Document | None:
    if len(files) == 1:
        return make_document(name, next(iter(files.values())), log)
    texts = {path: raw.decode("utf-8", "replace") for path, raw in files.items()}
    ordered = ((path, files[path]) for path in order_sources(texts))
    return concatenate_texts(name, ordered, log, header=_TEX_HEADER)


def _open_rows(where: str, files: RowFiles, config: DataConfig, place_log: ReadLog) -> Corpus:
    def read(log: ReadLog) -> Iterator[Document]:
        log.skipped.extend(place_log.skipped)
        with SpillStore() as store:
            for row in read_rows(files, log):
                meta = row.values.get("meta")
                text = find_text(row, (config.text_column,))
                raw = encode_text(text) if isinstance(text, str) else text
                if isinstance(meta, dict) and "file" in meta:
                    _gather(meta, raw, store, log)
                    continue
                categories = find_value(row, _CATEGORY_COLUMNS)
                name = find_value(row, _NAME_COLUMNS) or f"{row.file}:{row.number}"
                if categories and not is_mathematics(categories.strip("[]'\" ").replace("'", "")):
                    log.pass_over("papers that are not Mathematics")
                elif raw is None:
                    log.skip(name, "no text")
                else:
                    document = make_document(name, raw, log)
                    if document is not None:
                        yield document
            for paper in store.list_groups():
                document = _join_last_version(paper, store, log)
                if document is not None:
                    yield document

    return Corpus(f"arxiv:{where}, {len(files.addresses)} files of rows", read)


def _gather(meta: dict[str, object], raw: bytes | None, store: SpillStore, log: ReadLog) -> None:
    match = _PILE_FILE.fullmatch(str(meta["file"]))
    if meta.get("config") != "arxiv":
        log.pass_over("rows that are not papers of arXiv")
    elif match is None:
        log.skip(str(meta["file"]), "not the path of a paper's file")
    elif raw:
        path = str(PurePosixPath(match["path"]))
        store.add(match["paper"], f"{int(match['version'] or 1):04d}/{path}", raw)


def _join_last_version(paper: str, store: SpillStore, log: ReadLog) -> Document | None:
    names = store.list_names(paper)
    last = max(name.partition("/")[0] for name in names)
    files = {
        name.partition("/")[2]: store.read(paper, name)
        for name in names
        if name.startswith(f"{last}/")
    }
    return _join_paper(paper, files, log)
