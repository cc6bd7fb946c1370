"""Rows of Parquet and JSON Lines files, on this machine or on the Hugging Face hub, by `datasets`.

Both are read by the same code, one file after another and one row after another; of a file on the
hub only what is read is downloaded.
"""

from __future__ import annotations

import glob
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from memorizing.data.corpus import summarize_error
from memorizing.data.reading.places import list_files
from memorizing.data.text import ReadLog
from memorizing.errors import CorpusError
from memorizing.settings import find_nearest

_LINES = (".jsonl", ".ndjson", ".json")
ROW_SUFFIXES = (".parquet", *_LINES, *(f"{s}.{packed}" for s in _LINES for packed in ("gz", "zst")))
"""Endings of files of rows."""
_ROWS_AT_ONCE = 16  # a row may be a book


@dataclass(frozen=True)
class RowFiles:
    """Files of rows by name, in the order in which they are read."""

    addresses: Mapping[str, str]
    """Name -> path, or address on the hub."""
    is_remote: bool
    remedy: str
    """What to do where they cannot be reached."""


@dataclass(frozen=True)
class Row:
    """A row, with where it is from."""

    file: str
    number: int
    """From 1 on, in its file."""
    values: Mapping[str, Any]


def find_row_files(where: str, log: ReadLog, remedy: str) -> RowFiles:
    """Files of rows in a folder, of a pattern, or a file.

    Raises:
        CorpusError: there are none; the message ends with `remedy`.
    """
    try:
        files = list_files(where, log, ROW_SUFFIXES)
    except CorpusError as error:
        raise CorpusError(f"{error}; {remedy}") from error
    return RowFiles({name: str(path) for name, path in files.items()}, False, remedy)


def find_hub_files(dataset: str, patterns: Sequence[str], remedy: str) -> RowFiles:
    """Files of rows of a dataset on the hub, as it is now.

    Args:
        dataset: `OWNER/NAME`.
        patterns: of files in it, in the order in which they are read.
        remedy: the end of every message on what cannot be reached.

    Raises:
        CorpusError: the hub cannot be reached, or has no such dataset or files.
    """
    from datasets.data_files import resolve_pattern
    from datasets.exceptions import DatasetNotFoundError

    addresses: dict[str, str] = {}
    for pattern in patterns:
        try:
            found = resolve_pattern(f"hf://datasets/{dataset}/{pattern}", base_path="")
        except MemoryError:
            raise
        except (FileNotFoundError, DatasetNotFoundError):
            found = []
        except Exception as error:  # whatever the network, the hub and their libraries raise
            raise _explain_hub(dataset, error, remedy) from error
        names = {
            str(address).partition(f"{dataset}@")[2].partition("/")[2]: address for address in found
        }
        addresses |= {
            name: str(names[name]) for name in sorted(names) if name.endswith(ROW_SUFFIXES)
        }
    if not addresses:
        raise CorpusError(
            f"the hub has no files {' or '.join(patterns)} in the dataset {dataset!r}; {remedy}"
        )
    return RowFiles(addresses, True, remedy)


def parse_hub_place(where: str) -> tuple[str, str]:
    """`OWNER/NAME[/PATTERN]` -> the dataset, and the pattern of its files (all by default).

    Raises:
        CorpusError: there is no owner or name.
    """
    owner, _, rest = where.partition("/")
    name, _, pattern = rest.partition("/")
    if not owner or not name:
        raise CorpusError(
            f"{where!r} is no dataset of the hub; write OWNER/NAME, or OWNER/NAME/PATTERN for some "
            "of its files, such as codeparrot/codeparrot-clean/file-00000000000?.json.gz"
        )
    return f"{owner}/{name}", pattern or "**"


def read_rows(files: RowFiles, log: ReadLog) -> Iterator[Row]:
    """All rows. A file here that cannot be read to its end is noted in `log`, and so is a bad line.

    Raises:
        CorpusError: the hub fails: going on without the file would give another corpus.
    """
    for file, address in files.addresses.items():
        is_table = address.endswith(".parquet")
        rows = _stream(address, is_table, files.is_remote)
        number = 0
        while True:
            try:
                values = next(rows, None)
            except MemoryError:
                raise
            except Exception as error:  # datasets passes on whatever its readers raise
                if files.is_remote:
                    raise _explain_hub(file, error, files.remedy) from error
                log.skip(file, f"cannot be read after row {number} ({summarize_error(error)})")
                break
            if values is None:
                break
            number += 1
            if not is_table:
                values = _parse_line(values["text"], f"{file}:{number}", log)
            if values:
                yield Row(file, number, values)


def find_text(row: Row, columns: Iterable[str]) -> str | bytes | None:
    """The text of a row: in the first of `columns` that it has; None where that is null.

    Raises:
        CorpusError: it has none of them, or the column does not hold text.
    """
    known = list(row.values)
    column = next((name for name in columns if name in row.values), None)
    place = f"row {row.number} of {row.file!r}"
    if column is None:
        wanted = next(iter(columns))
        raise CorpusError(
            f"{place} has no column {wanted!r}; {find_nearest(wanted, known)} Set "
            "data.text_column to the one that holds text"
        )
    value = row.values[column]
    if value is not None and not isinstance(value, (str, bytes)):
        raise CorpusError(
            f"column {column!r} in {place} is {type(value).__name__}; set data.text_column to a "
            "column of text"
        )
    return value


def find_value(row: Row, columns: Iterable[str]) -> str | None:
    """The first of these columns that has a value, as a text."""
    for column in columns:
        value = row.values.get(column)
        if value is not None and str(value).strip():
            return str(value).strip()
    return None


def _stream(address: str, is_table: bool, is_remote: bool) -> Iterator[dict[str, Any]]:
    import datasets

    file = address if is_remote else glob.escape(address)
    if is_table:
        rows = datasets.load_dataset(
            "parquet", data_files=file, split="train", streaming=True, batch_size=_ROWS_AT_ONCE
        )
    else:
        # As lines: the objects of one file may differ in their fields, which a table cannot.
        rows = datasets.load_dataset(
            "text", data_files=file, split="train", streaming=True, encoding_errors="replace"
        )
    yield from rows  # type: ignore[misc]


def _parse_line(line: str, name: str, log: ReadLog) -> dict[str, Any] | None:
    if not line.strip():
        return None
    try:
        values = json.loads(line)
    except ValueError:
        values = None
    if not isinstance(values, dict):
        log.skip(name, "not a JSON object")
        return None
    return values


def _explain_hub(what: str, error: Exception, remedy: str) -> CorpusError:
    return CorpusError(
        f"cannot read {what!r} from the Hugging Face hub ({summarize_error(error)}); connect to "
        f"the network and try again, or use files on this machine: {remedy}"
    )
