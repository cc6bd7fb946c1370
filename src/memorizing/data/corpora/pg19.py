"""PG-19: books published before 1919 (Rae et al. 2020)."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from memorizing.config import DataConfig
from memorizing.data.corpora.sources import C4, PG19
from memorizing.data.corpus import Corpus
from memorizing.data.reading.tables import (
    Row,
    RowFiles,
    find_hub_files,
    find_row_files,
    find_text,
    find_value,
    parse_hub_place,
    read_rows,
)
from memorizing.data.text import Document, ReadLog, encode_text, make_document, read_bytes

HUB_DATASET = "emozilla/pg19"
SPLITS = ("validation", "test", "train")
"""In the order in which they are read: a corpus that is cut short has whole held-out splits."""
_NUMBER = re.compile(r"\d+")


def open_pg19(where: str, config: DataConfig) -> Corpus:
    """`pg19[:WHERE]`: a document per book, named by split and number: `train/12345`.

    So `data.validation=validation/*` and `data.test=test/*` hold out what the authors did. The
    small splits come first (50 and 100 books), then the training split: `data.max_documents=250`
    has 100 of its books.

    WHERE is `hub` (also when left out): emozilla/pg19, which is read as a stream; a folder in the
    authors' layout (`train/12345.txt`, `validation/`, `test/`); or files of rows with the hub's
    columns, whose names begin with their split.

    Raises:
        CorpusError: there is no such folder, or it has no books; the hub cannot be reached.
    """
    if where == "hub":
        patterns = [f"data/{split}-*.parquet" for split in SPLITS]
        return _open_rows(where, find_hub_files(HUB_DATASET, patterns, PG19), config)
    folder = Path(where).expanduser()
    books = [
        (f"{split}/{path.stem}", path)
        for split in SPLITS
        for path in sorted(folder.glob(f"{split}/*.txt"))
    ]
    if not books:
        return _open_rows(where, find_row_files(where, ReadLog(), PG19), config)

    def read(log: ReadLog) -> Iterator[Document]:
        for name, path in books:
            raw = read_bytes(path, name, log)
            document = None if raw is None else make_document(name, raw, log)
            if document is not None:
                yield document

    return Corpus(f"pg19:{where}, {len(books)} books", read)


def _open_rows(where: str, files: RowFiles, config: DataConfig) -> Corpus:
    by_split = sorted(files.addresses, key=lambda name: SPLITS.index(_find_split(name)))
    addresses = {name: files.addresses[name] for name in by_split}

    def read(log: ReadLog) -> Iterator[Document]:
        for row in read_rows(RowFiles(addresses, files.is_remote, files.remedy), log):
            name = _name_book(row)
            text = find_text(row, (config.text_column,))
            raw = encode_text(text or "") if not isinstance(text, bytes) else text
            document = make_document(name, raw, log)
            if document is not None:
                yield document

    return Corpus(f"pg19:{where}, {len(addresses)} files of rows", read)


def _find_split(file: str) -> str:
    words = re.split(r"\W", PurePosixPath(file).as_posix())
    return next((split for split in SPLITS if split in words), "train")


def _name_book(row: Row) -> str:
    """By the book's number, the end of its address at Project Gutenberg; else by title or row."""
    numbers = _NUMBER.findall(find_value(row, ("url",)) or "")
    title = find_value(row, ("short_book_title",))
    name = numbers[-1] if numbers else f"{title or PurePosixPath(row.file).name} ({row.number})"
    return f"{_find_split(row.file)}/{name}"


HUB_DATASET = "allenai/c4"
_HUB_PATTERN = "en/c4-train.*.json.gz"
MIN_TOKENS = 4096
"""The paper's least length of a document."""


def open_c4(where: str, config: DataConfig) -> Corpus:
    """`c4[:WHERE]`: a document per page that is long enough, named by its address, file and row.

    WHERE is `hub` (also when left out), the English part of allenai/c4, read as a stream;
    `hub:OWNER/NAME/PATTERN`; or files `c4-train.*.json.gz` of a folder or pattern (JSON lines with
    `text` and `url`, also not packed, or Parquet).

    Pages of fewer than 4,096 bytes (or `data.min_document_tokens` bytes, where that is not 0) are
    passed over at once: a token has at least one byte, so they cannot have as many tokens. What is
    exactly long enough depends on the tokenizer: set `data.min_document_tokens=4096`.

    Raises:
        CorpusError: there are no such files; the hub cannot be reached.
    """
    place_log = ReadLog()
    kind, _, dataset = where.partition(":")
    if kind == "hub":
        name, pattern = parse_hub_place(dataset) if dataset else (HUB_DATASET, _HUB_PATTERN)
        files = find_hub_files(name, [pattern], C4)
    else:
        files = find_row_files(where, place_log, C4)
    min_bytes = config.min_document_tokens or MIN_TOKENS

    def read(log: ReadLog) -> Iterator[Document]:
        log.skipped.extend(place_log.skipped)
        for row in read_rows(files, log):
            text = find_text(row, (config.text_column,)) or ""
            raw = text if isinstance(text, bytes) else encode_text(text)
            if len(raw) < min_bytes:
                log.pass_over(f"pages of fewer than {min_bytes:,} bytes")
                continue
            file = PurePosixPath(row.file).name.partition(".json")[0].removesuffix(".parquet")
            name = f"{find_value(row, ('url',)) or 'page'} ({file}:{row.number})"
            document = make_document(name, raw, log)
            if document is not None:
                yield document

    return Corpus(
        f"c4:{where}, {len(files.addresses)} files, pages of at least {min_bytes:,} bytes", read
    )
