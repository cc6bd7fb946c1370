"""Rows of JSON lines and Parquet files with a text column, a document each, read as a stream."""

from __future__ import annotations

from collections.abc import Iterator

from memorizing.config import DataConfig
from memorizing.data.corpus import Corpus
from memorizing.data.reading.files import list_files
from memorizing.data.reading.tables import (
    Row,
    RowFiles,
    explain_column,
    find_text,
    read_column_names,
    read_rows,
)
from memorizing.data.text import Document, ReadLog, encode_text, make_document

NAME_COLUMNS = ("name", "id")
"""The first of these that a row has names its document; else that is `file:row`, from row 1."""


def open_jsonl(where: str, config: DataConfig) -> Corpus:
    """`jsonl:PATH`: one document per line, a JSON object with the text in `config.text_column`.

    Raises:
        CorpusError: the path does not exist; while reading: a line is not a JSON object or lacks
            the column.
    """
    return _open_rows("jsonl", where, (".jsonl", ".ndjson", ".json"), config)


def open_parquet(where: str, config: DataConfig) -> Corpus:
    """`parquet:PATH`: one document per row, the text in `config.text_column` (strings or bytes).

    Raises:
        CorpusError: the path does not exist, a file is not Parquet, or lacks the column; or
            pyarrow is not installed.
    """
    corpus = _open_rows("parquet", where, (".parquet",), config)
    for file, path in list_files(where, ReadLog(), (".parquet",)).items():
        known = read_column_names(file, path)
        if config.text_column not in known:
            raise explain_column(config.text_column, f"file {file!r}", known)
    return corpus


def _open_rows(kind: str, where: str, suffixes: tuple[str, ...], config: DataConfig) -> Corpus:
    place_log = ReadLog()
    files = list_files(where, place_log, suffixes)
    addresses = RowFiles({name: str(path) for name, path in files.items()}, False, "")
    column = config.text_column

    def read(log: ReadLog) -> Iterator[Document]:
        log.skipped.extend(place_log.skipped)
        for row in read_rows(addresses, log, columns=(column, *NAME_COLUMNS), strict=True):
            name = _find_name(row, column) or f"{row.file}:{row.number}"
            text = find_text(row, (column,))
            if text is None:
                log.skip(name, "no text")
                continue
            raw = text if isinstance(text, bytes) else encode_text(text)
            document = make_document(name, raw, log)
            if document is not None:
                yield document

    return Corpus(f"{kind}:{where}, {len(files)} files, column {column!r}", read)


def _find_name(row: Row, column: str) -> str | None:
    for key in NAME_COLUMNS:
        value = row.values.get(key)
        if key == column or value is None or isinstance(value, (bool, float)):
            continue
        if isinstance(value, (str, int, bytes)):
            raw = value if isinstance(value, bytes) else encode_text(str(value))
            return raw.decode("utf-8", errors="replace").strip() or None
    return None
