"""Rows of JSON lines and Parquet files with a text column, a document each, read as a stream."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from memorizing.config import DataConfig
from memorizing.data.corpus import Corpus, summarize_error
from memorizing.data.reading.places import list_files
from memorizing.data.text import Document, ReadLog, encode_text, make_document
from memorizing.errors import CorpusError
from memorizing.settings import find_nearest

NAME_COLUMNS = ("name", "id")
"""The first of these that a row has names its document; else that is `file:row`, from row 1."""
_ROWS_AT_ONCE = 64


def open_jsonl(where: str, config: DataConfig) -> Corpus:
    """`jsonl:PATH`: one document per line, a JSON object with the text in `config.text_column`.

    Raises:
        CorpusError: the path does not exist; while reading: a line is not a JSON object or lacks
            the column.
    """
    place_log = ReadLog()
    files = list_files(where, place_log, (".jsonl", ".ndjson", ".json"))

    def read(log: ReadLog) -> Iterator[Document]:
        log.skipped.extend(place_log.skipped)
        for file, path in files.items():
            for number, row in _read_lines(file, path):
                if config.text_column not in row:
                    raise _explain_column(
                        config.text_column, f"line {number} of {file!r}", list(row)
                    )
                yield from _make_row(file, number, row, config.text_column, log)

    return Corpus(f"jsonl:{where}, {len(files)} files, column {config.text_column!r}", read)


def open_parquet(where: str, config: DataConfig) -> Corpus:
    """`parquet:PATH`: one document per row, the text in `config.text_column` (strings or bytes).

    Raises:
        CorpusError: the path does not exist, a file is not Parquet, or lacks the column.
    """
    import pyarrow
    from pyarrow import parquet

    place_log = ReadLog()
    files = list_files(where, place_log, (".parquet",))
    columns: dict[str, list[str]] = {}
    for file, path in files.items():
        try:
            known = parquet.read_schema(path).names
        except (pyarrow.ArrowException, OSError) as error:
            raise _explain_parquet(file, error) from error
        if config.text_column not in known:
            raise _explain_column(config.text_column, f"file {file!r}", known)
        columns[file] = [
            config.text_column,
            *(name for name in NAME_COLUMNS if name in known and name != config.text_column),
        ]

    def read(log: ReadLog) -> Iterator[Document]:
        log.skipped.extend(place_log.skipped)
        for file, path in files.items():
            number = 0
            try:
                with parquet.ParquetFile(path) as table:
                    for batch in table.iter_batches(
                        batch_size=_ROWS_AT_ONCE, columns=columns[file]
                    ):
                        for row in _to_rows(batch):
                            number += 1
                            yield from _make_row(file, number, row, config.text_column, log)
            except (pyarrow.ArrowException, OSError) as error:
                raise _explain_parquet(file, error) from error

    return Corpus(f"parquet:{where}, {len(files)} files, column {config.text_column!r}", read)


def _read_lines(file: str, path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    try:
        with path.open("rb") as lines:
            for number, line in enumerate(lines, start=1):
                if not line.strip():
                    continue
                try:
                    # A byte that is not UTF-8 is escaped here, and replaced and counted where the
                    # document is made.
                    row = json.loads(line.decode("utf-8", errors="surrogateescape"))
                except ValueError as error:
                    raise CorpusError(
                        f"line {number} of {file!r} is not JSON ({error}); each line must be one "
                        "object"
                    ) from error
                if not isinstance(row, dict):
                    raise CorpusError(
                        f"line {number} of {file!r} is a {type(row).__name__}; each line must be "
                        "one JSON object"
                    )
                yield number, row
    except OSError as error:
        raise CorpusError(
            f"cannot read {file!r}: {error.strerror}; give a readable file"
        ) from error


def _to_rows(batch: Any) -> list[dict[str, Any]]:
    import pyarrow

    # As bytes: a string column may hold what is not UTF-8.
    arrays = []
    for array in batch.columns:
        if pyarrow.types.is_dictionary(array.type):
            array = array.dictionary_decode()
        if pyarrow.types.is_string(array.type):
            array = array.cast(pyarrow.binary())
        elif pyarrow.types.is_large_string(array.type):
            array = array.cast(pyarrow.large_binary())
        arrays.append(array.to_pylist())
    return [dict(zip(batch.schema.names, row, strict=True)) for row in zip(*arrays, strict=True)]


def _make_row(
    file: str, number: int, row: dict[str, Any], column: str, log: ReadLog
) -> Iterator[Document]:
    name = _find_name(row, column) or f"{file}:{number}"
    value = row[column]
    if value is None:
        log.skip(name, "no text")
        return
    if not isinstance(value, (str, bytes)):
        raise CorpusError(
            f"column {column!r} of row {number} in {file!r} is {type(value).__name__}; set "
            "data.text_column to a column of text"
        )
    document = make_document(name, value if isinstance(value, bytes) else encode_text(value), log)
    if document is not None:
        yield document


def _find_name(row: dict[str, Any], column: str) -> str | None:
    for key in NAME_COLUMNS:
        value = row.get(key)
        if key == column or value is None or isinstance(value, (bool, float)):
            continue
        if isinstance(value, (str, int, bytes)):
            raw = value if isinstance(value, bytes) else encode_text(str(value))
            return raw.decode("utf-8", errors="replace").strip() or None
    return None


def _explain_column(column: str, place: str, known: list[str]) -> CorpusError:
    return CorpusError(
        f"{place} has no column {column!r} (data.text_column); {find_nearest(column, known)}"
    )


def _explain_parquet(file: str, error: Exception) -> CorpusError:
    return CorpusError(
        f"cannot read {file!r} as Parquet ({summarize_error(error)}); give a whole Parquet file"
    )
