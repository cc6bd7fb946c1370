"""A row, a document: JSON lines and Parquet files of the user's own, PG-19 and C4."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import PurePosixPath

from memorizing.config import DataConfig
from memorizing.data.corpora.folders import open_listed
from memorizing.data.corpus import Corpus
from memorizing.data.reading.files import list_files, locate
from memorizing.data.reading.tables import (
    Row,
    RowFiles,
    explain_column,
    find_rows,
    find_text,
    find_value,
    read_column_names,
    read_rows,
)
from memorizing.data.text import Document, ReadLog, encode_text, make_document

NAME_COLUMNS = ("name", "id")
"""The first of these that a row has names its document; else that is `file:row`, from row 1."""
PG19_DATASET = "emozilla/pg19"
PG19_SPLITS = ("validation", "test", "train")
"""In the order in which they are read: a corpus that is cut short has whole held-out splits."""
PG19_SOURCE = (
    "PG-19 has 28,752 books, 11.5 GB of text: write pg19 to stream it from the hub "
    "(emozilla/pg19), or give a folder with train/, validation/ and test/ as "
    "`gsutil -m cp -r gs://deepmind-gutenberg .` downloads it"
)
"""What to download, and how large it is: as its publisher says, or rounded; so for all corpora."""
C4_DATASET, C4_PATTERN = "allenai/c4", "en/c4-train.*.json.gz"
C4_MIN_TOKENS = 4096
"""The paper's least length of a document."""
C4_SOURCE = (
    "C4 in English is 305 GB of gzip, 1,024 files: write c4 to stream it from the hub "
    "(allenai/c4), or give a folder with some of its files en/c4-train.*.json.gz (300 MB each)"
)
_NUMBER = re.compile(r"\d+")


def open_jsonl(where: str, config: DataConfig) -> Corpus:
    """`jsonl:PATH`: one document per line, a JSON object with the text in `config.text_column`.

    Raises:
        CorpusError: the path does not exist; while reading: a line is not a JSON object or lacks
            the column.
    """
    return _open_own("jsonl", where, (".jsonl", ".ndjson", ".json"), config)


def open_parquet(where: str, config: DataConfig) -> Corpus:
    """`parquet:PATH`: one document per row, the text in `config.text_column` (strings or bytes).

    Raises:
        CorpusError: the path does not exist, a file is not Parquet, or lacks the column; or
            pyarrow is not installed.
    """
    for file, path in list_files(where, ReadLog(), (".parquet",)).items():
        known = read_column_names(file, path)
        if config.text_column not in known:
            raise explain_column(config.text_column, f"file {file!r}", known)
    return _open_own("parquet", where, (".parquet",), config)


def _open_own(kind: str, where: str, suffixes: tuple[str, ...], config: DataConfig) -> Corpus:
    found, column = ReadLog(), config.text_column
    files = list_files(where, found, suffixes)
    rows = RowFiles({name: str(path) for name, path in files.items()}, False, "")

    def read(log: ReadLog) -> Iterator[Document | None]:
        for row in read_rows(rows, log, columns=(column, *NAME_COLUMNS), strict=True):
            name = _find_name(row, column) or f"{row.file}:{row.number}"
            yield make_document(name, find_text(row, (column,)), log)

    return Corpus(f"{kind}:{where}, {len(files)} files, column {column!r}", read, found=found)


def _find_name(row: Row, column: str) -> str | None:
    for key in NAME_COLUMNS:
        value = row.values.get(key)
        if key == column or value is None or isinstance(value, (bool, float)):
            continue
        if isinstance(value, (str, int, bytes)):
            raw = value if isinstance(value, bytes) else encode_text(str(value))
            return raw.decode("utf-8", errors="replace").strip() or None
    return None


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
    folder, found = locate(where), ReadLog()
    books = {
        f"{split}/{path.stem}": path
        for split in PG19_SPLITS
        for path in sorted(folder.glob(f"{split}/*.txt"))
    }
    if books and where != "hub":
        return open_listed(f"pg19:{where}", books, found, "books")
    patterns = [f"data/{split}-*.parquet" for split in PG19_SPLITS]
    files = find_rows(where, found, PG19_SOURCE, PG19_DATASET, patterns)
    in_order = sorted(files.addresses, key=lambda name: PG19_SPLITS.index(_find_split(name)))
    addresses = {name: files.addresses[name] for name in in_order}

    def read(log: ReadLog) -> Iterator[Document | None]:
        for row in read_rows(RowFiles(addresses, files.is_remote, files.remedy), log):
            yield make_document(_name_book(row), find_text(row, (config.text_column,)), log)

    return Corpus(f"pg19:{where}, {len(addresses)} files of rows", read, found=found)


def _find_split(file: str) -> str:
    words = re.split(r"\W", PurePosixPath(file).as_posix())
    return next((split for split in PG19_SPLITS if split in words), "train")


def _name_book(row: Row) -> str:
    """By the book's number, the end of its address at Project Gutenberg; else by title or row."""
    numbers = _NUMBER.findall(find_value(row, ("url",)) or "")
    title = find_value(row, ("short_book_title",))
    name = numbers[-1] if numbers else f"{title or PurePosixPath(row.file).name} ({row.number})"
    return f"{_find_split(row.file)}/{name}"


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
    found = ReadLog()
    files = find_rows(where, found, C4_SOURCE, C4_DATASET, [C4_PATTERN])
    min_bytes = config.min_document_tokens or C4_MIN_TOKENS

    def read(log: ReadLog) -> Iterator[Document | None]:
        for row in read_rows(files, log):
            raw = find_text(row, (config.text_column,))
            if len(raw) < min_bytes:
                log.pass_over(f"pages of fewer than {min_bytes:,} bytes")
                continue
            file = PurePosixPath(row.file).name.partition(".json")[0].removesuffix(".parquet")
            name = f"{find_value(row, ('url',)) or 'page'} ({file}:{row.number})"
            yield make_document(name, raw, log)

    description = f"c4:{where}, {len(files.addresses)} files, pages of at least {min_bytes:,} bytes"
    return Corpus(description, read, found=found)
