"""Rows of Parquet and JSON Lines files, on this machine or on the Hugging Face hub.

One file is read after another and one row after another; of a file on the hub only what is read is
downloaded. Texts come as their bytes: what is not UTF-8 is counted where a document is made of
them.
"""

from __future__ import annotations

import io
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from memorizing.data.reading.archives import INSTALL, MAX_MEMBER_BYTES, read_lines, unpack
from memorizing.data.reading.files import explain_unreadable, list_files
from memorizing.data.text import ReadLog, encode_text, summarize_error
from memorizing.errors import CorpusError, MemorizingError
from memorizing.settings import find_nearest
from memorizing.storage.files import open_plain

_LINES = (".jsonl", ".ndjson", ".json")
ROW_SUFFIXES = (".parquet", *_LINES, *(f"{s}.{packed}" for s in _LINES for packed in ("gz", "zst")))
"""Endings of files of rows."""
_HUB = "hf://"
_NO_ROWS = re.compile(r"(.*/)?((\.|__).*|config\.json|dataset_(dict|infos?)\.json)", re.DOTALL)
"""What is hidden in a dataset of the hub, or describes it."""
_ROWS_AT_ONCE = 16  # a row may be a book


@dataclass(frozen=True)
class Row:
    """A row, with where it is from."""

    file: str
    number: int
    """From 1 on, in its file."""
    values: Mapping[str, Any]


def find_rows(
    where: str, log: ReadLog, remedy: str, dataset: str = "", patterns: Sequence[str] = ("**",)
) -> dict[str, str]:
    """Files of rows: of a folder, a pattern or a file; or of a dataset on the hub, as it is now.

    Args:
        where: a path; `hub:OWNER/NAME`; `hub:OWNER/NAME/PATTERN`; or `hub` for the next two.
        log: where what is left out is noted.
        remedy: the end of every message on what cannot be reached.
        dataset: `OWNER/NAME` that `hub` alone stands for.
        patterns: of its files, in the order in which they are read.

    Returns:
        Name -> path or address, in the order in which `read_rows` reads them.

    Raises:
        CorpusError: there are none; the hub cannot be reached, or has no such dataset or files.
    """
    kind, _, given = where.partition(":")
    if kind != "hub":
        try:
            files = list_files(where, log, ROW_SUFFIXES)
        except CorpusError as error:
            raise CorpusError(f"{error}; {remedy}") from error
        return {name: str(path) for name, path in files.items()}
    if given or not dataset:
        owner, _, rest = given.partition("/")
        name, _, pattern = rest.partition("/")
        if not owner or not name:
            raise CorpusError(
                f"{where!r} names no dataset of the hub; write hub:OWNER/NAME, or "
                "hub:OWNER/NAME/PATTERN for some of its files, such as "
                f"hub:codeparrot/codeparrot-clean/file-00000000000?.json.gz. Or {remedy}"
            )
        dataset, patterns = f"{owner}/{name}", (pattern or "**",)
    try:
        found = _list_hub(dataset, patterns)
    except MemoryError:
        raise
    except Exception as error:  # whatever the network, the hub and their libraries raise
        raise _explain_hub(dataset, error, remedy) from error
    if not found:
        raise CorpusError(
            f"the hub has no files {' or '.join(patterns)} in the dataset {dataset!r}; {remedy}"
        )
    return found


def _list_hub(dataset: str, patterns: Sequence[str]) -> dict[str, str]:
    from huggingface_hub import HfApi, HfFileSystem
    from huggingface_hub.errors import RepositoryNotFoundError

    try:
        # Files are those of one commit, whatever is uploaded while they are read.
        folder = f"datasets/{dataset}@{HfApi().dataset_info(dataset).sha}/"
    except RepositoryNotFoundError:
        return {}
    found: dict[str, str] = {}
    for pattern in patterns:
        listed: Any = HfFileSystem().glob(folder + pattern, detail=True)
        for address in sorted(listed):
            name = address.removeprefix(folder)
            is_asked = not _NO_ROWS.fullmatch(name) or _NO_ROWS.fullmatch(pattern)
            if listed[address]["type"] == "file" and name.endswith(ROW_SUFFIXES) and is_asked:
                found[name] = _HUB + address
    return found


def read_rows(
    files: Mapping[str, str],
    log: ReadLog,
    *,
    columns: Iterable[str] = (),
    strict: bool = False,
    remedy: str = "",
) -> Iterator[Row]:
    """All rows.

    Args:
        files: where they are, as `find_rows` says.
        log: where a file that cannot be read to its end is noted, and a line that is no object.
        columns: of tables, only these are read; () is all.
        strict: refuse such a file or line instead.
        remedy: what to do where the hub fails.

    Raises:
        CorpusError: the hub fails: going on without the file would give another corpus; or a
            package is missing that reads such files; or see `strict`.
    """
    for file, address in files.items():
        number = 0
        try:
            for number, values in enumerate(_read_file(address, tuple(columns)), start=1):
                if not isinstance(values, ValueError):
                    if values:
                        yield Row(file, number, values)
                elif strict:
                    raise CorpusError(
                        f"line {number} of {file!r} {values}; each line must be one JSON object"
                    ) from values
                else:
                    log.skip(f"{file}:{number}", "not a JSON object")
        except (MemoryError, MemorizingError):
            raise
        except Exception as error:  # libraries pass on whatever their readers raise
            if address.startswith(_HUB):
                raise _explain_hub(file, error, remedy) from error
            if isinstance(error, OSError):
                explain_unreadable(error)
            reason = f"cannot be read after row {number} ({summarize_error(error)})"
            if strict:
                raise CorpusError(f"{file!r} {reason}; give a whole file of its kind") from error
            log.skip(file, reason)


def find_text(row: Row, columns: Iterable[str]) -> bytes:
    """The text of a row, in the first of `columns` that it has, as it was read; b"" for null.

    Raises:
        CorpusError: it has none of them, or the column does not hold text.
    """
    column = next((name for name in columns if name in row.values), None)
    if column is None:
        place = f"row {row.number} of {row.file!r}"
        raise explain_column(next(iter(columns)), place, row.values)
    value = row.values[column]
    if value is not None and not isinstance(value, (str, bytes)):
        raise CorpusError(
            f"column {column!r} of row {row.number} in {row.file!r} is {type(value).__name__}; set "
            "data.text_column to a column of text"
        )
    return encode_text(value) if isinstance(value, str) else value or b""


def find_value(row: Row, columns: Iterable[str]) -> str | None:
    """The first of these columns that has a value, as a text."""
    values = (row.values.get(column) for column in columns)
    return next(filter(None, (show_value(value) for value in values if value is not None)), None)


def show_value(value: object) -> str:
    """A value as a text, without white space around it."""
    raw = value if isinstance(value, bytes) else encode_text(str(value))
    return raw.decode("utf-8", errors="replace").strip()


def read_column_names(file: str, path: Path) -> list[str]:
    """The columns of a Parquet file.

    Raises:
        CorpusError: it is none, or pyarrow is not installed.
    """
    parquet = _import_parquet()
    try:
        with open(open_plain(path), "rb") as opened:
            return parquet.read_schema(opened).names
    except Exception as error:  # whatever damage makes pyarrow raise
        raise CorpusError(
            f"cannot read {file!r} as Parquet ({summarize_error(error)}); give a whole Parquet file"
        ) from error


def explain_column(column: str, place: str, known: Iterable[str]) -> CorpusError:
    """The error for a column that is not there, with the nearest."""
    return CorpusError(
        f"{place} has no column {column!r} (data.text_column); {find_nearest(column, list(known))} "
        "Set it to the one that holds text"
    )


def _import_parquet() -> Any:
    try:
        from pyarrow import parquet
    except ImportError as error:
        raise CorpusError(f"Parquet files need pyarrow; {INSTALL}") from error
    return parquet


def _read_file(address: str, columns: Sequence[str]) -> Iterator[dict[str, Any] | ValueError]:
    with _open(address) as file:
        if address.endswith(".parquet"):
            yield from _read_table(file, columns)
            return
        size = file.seek(0, io.SEEK_END)
        file.seek(0)
        with unpack(file) as stream:
            for line in read_lines(stream, size, Path(address).name, MAX_MEMBER_BYTES):
                yield _parse_line(line)


def _open(address: str) -> Any:
    if not address.startswith(_HUB):
        return open(open_plain(Path(address)), "rb")
    from huggingface_hub import HfFileSystem

    file: Any = HfFileSystem().open(address, "rb")
    return io.BufferedReader(file)


def _parse_line(line: bytes) -> dict[str, Any] | ValueError:
    """A row; {} where there is none; an error that is not raised where it is not an object."""
    if not line.strip():
        return {}
    try:
        # A byte that is not UTF-8 is escaped here, and replaced and counted where the document is
        # made.
        row = json.loads(line.decode("utf-8", errors="surrogateescape").removeprefix("\ufeff"))
    except RecursionError:
        return ValueError("is nested too deeply")
    except ValueError as error:
        return ValueError(f"is not JSON ({error})")
    return row if isinstance(row, dict) else ValueError(f"is a {type(row).__name__}")


def _read_table(file: Any, columns: Sequence[str]) -> Iterator[dict[str, Any]]:
    with _import_parquet().ParquetFile(file) as table:
        kept = [name for name in table.schema_arrow.names if not columns or name in columns]
        for batch in table.iter_batches(batch_size=_ROWS_AT_ONCE, columns=kept):
            yield from _to_rows(batch)


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


def _explain_hub(what: str, error: Exception, remedy: str) -> CorpusError:
    return CorpusError(
        f"cannot read {what!r} from the Hugging Face hub ({summarize_error(error)}); connect to "
        f"the network and try again, or use files on this machine: {remedy}"
    )
