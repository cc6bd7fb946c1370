"""Corpora whose texts are in rows: one's own files, PG-19 and C4, and repositories of code."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import PurePosixPath
from typing import Any

from memorizing.config import DataConfig
from memorizing.data.corpora.folders import open_listed, open_repositories
from memorizing.data.corpora.spill import SpillStore
from memorizing.data.corpus import Corpus
from memorizing.data.reading.files import list_files, locate
from memorizing.data.reading.tables import (
    ROW_SUFFIXES,
    Row,
    explain_column,
    find_rows,
    find_text,
    find_value,
    read_column_names,
    read_rows,
    show_value,
)
from memorizing.data.text import (
    Document,
    ReadLog,
    concatenate_texts,
    drop_binary,
    make_document,
    shuffle_tree,
)
from memorizing.errors import CorpusError

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
REPOSITORY_COLUMNS = ("repo_name", "repository_name", "max_stars_repo_name", "repo")
PATH_COLUMNS = ("path", "file_path", "max_stars_repo_path")
TEXT_COLUMNS = ("content", "code", "text")
GITHUB_SOURCE = (
    "give a folder of checkouts (`git clone --depth 1` of each repository), or "
    "github:hub:OWNER/NAME/PATTERN for files of a dataset on the hub with the columns repo_name, "
    "path and content or code, such as "
    "github:hub:codeparrot/github-code-clean/data/train-0000?-of-*.parquet (10 of its 880 files, "
    "about 3 GB; in all about 300 GB)"
)
_ROWS_NOT_CODE = tuple(suffix for suffix in ROW_SUFFIXES if suffix != ".json")


def _open_rows(
    description: str,
    files: Mapping[str, str],
    found: ReadLog,
    make: Callable[[Row, ReadLog], Document | None],
    **options: Any,
) -> Corpus:
    """A document per row, as `make` makes it; the other arguments are of `Corpus`, `read_rows`."""

    def read(log: ReadLog) -> Iterator[Document | None]:
        return (make(row, log) for row in read_rows(files, log, **options))

    return Corpus(description, read, found=found)


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
    files = {name: str(path) for name, path in list_files(where, found, suffixes).items()}
    names = [name for name in NAME_COLUMNS if name != column]

    def make(row: Row, log: ReadLog) -> Document | None:
        values = (row.values.get(name) for name in names)
        own = (v for v in values if isinstance(v, (str, int, bytes)) and not isinstance(v, bool))
        name = show_value(next(own, "")) or f"{row.file}:{row.number}"
        return make_document(name, find_text(row, (column,)), log)

    description = f"{kind}:{where}, {len(files)} files, column {column!r}"
    return _open_rows(description, files, found, make, columns=(column, *names), strict=True)


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
    in_order = sorted(files, key=lambda name: PG19_SPLITS.index(_find_split(name)))

    def make(row: Row, log: ReadLog) -> Document | None:
        return make_document(_name_book(row), find_text(row, (config.text_column,)), log)

    return _open_rows(
        f"pg19:{where}, {len(files)} files of rows",
        {name: files[name] for name in in_order},
        found,
        make,
        remedy=PG19_SOURCE,
    )


def _find_split(file: str) -> str:
    words = re.split(r"\W", file)
    return next((split for split in PG19_SPLITS if split in words), "train")


def _name_book(row: Row) -> str:
    """By the book's number, the end of its address at Project Gutenberg; else by title or row."""
    numbers = re.findall(r"\d+", find_value(row, ("url",)) or "")
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

    def make(row: Row, log: ReadLog) -> Document | None:
        raw = find_text(row, (config.text_column,))
        if len(raw) < min_bytes:
            log.pass_over(f"pages of fewer than {min_bytes:,} bytes")
            return None
        file = PurePosixPath(row.file).name.partition(".json")[0].removesuffix(".parquet")
        name = f"{find_value(row, ('url',)) or 'page'} ({file}:{row.number})"
        return make_document(name, raw, log)

    description = f"c4:{where}, {len(files)} files, pages of at least {min_bytes:,} bytes"
    return _open_rows(description, files, found, make, remedy=C4_SOURCE)


def open_github(where: str, config: DataConfig) -> Corpus:
    """`github:WHERE`: a document per repository, its text files in the paper's order (4.1).

    WHERE is a folder of checkouts (as `repositories:`), a folder that itself has files of rows
    (Parquet, or JSON lines that are not called .json), such a file, or `hub:OWNER/NAME[/PATTERN]`.
    Rows have a repository's name, a path and a text, in the columns that datasets of code use
    (`REPOSITORY_COLUMNS`, `PATH_COLUMNS`, `TEXT_COLUMNS`).

    Rows of one repository may lie anywhere: they are all read first and gathered in a temporary
    file, which takes disk, not memory, and is made anew at each reading. `data.max_documents`
    therefore saves no reading here: name some of the files by a pattern.

    Raises:
        CorpusError: the path does not exist or has neither subfolders nor rows; the hub cannot be
            reached; while reading: a row lacks its columns.
        ResourceError: while reading: the disk is full.
    """
    found, path = ReadLog(), locate(where)
    is_local = where.partition(":")[0] != "hub" and path.is_dir()
    if is_local and not any(p.name.endswith(_ROWS_NOT_CODE) for p in path.iterdir()):
        try:
            return open_repositories(where, config, kind="github")
        except CorpusError as error:
            raise CorpusError(f"{error}; {GITHUB_SOURCE}") from error
    files = find_rows(where, found, GITHUB_SOURCE)
    columns = TEXT_COLUMNS if config.text_column == "text" else (config.text_column,)

    def read(log: ReadLog) -> Iterator[Document | None]:
        with SpillStore() as store:
            for row in read_rows(files, log, remedy=GITHUB_SOURCE):
                repository = _require_value(row, REPOSITORY_COLUMNS)
                # As a plain relative path, so that equal ones are equal: `./a` is `a`.
                name = str(PurePosixPath(_require_value(row, PATH_COLUMNS)))
                raw = drop_binary(f"{name} in {repository}", find_text(row, columns), log)
                if raw:
                    store.add(repository, name, raw)
            for repository in store.list_groups():
                texts = store.list_texts(repository)
                ordered = shuffle_tree(map(PurePosixPath, texts), f"{config.seed}/{repository}")
                contents = ((name, store.read(texts[str(name)])) for name in ordered)
                yield concatenate_texts(repository, contents, log)

    return Corpus(f"github:{where}, {len(files)} files of rows", read, found=found)


def _require_value(row: Row, columns: tuple[str, ...]) -> str:
    value = find_value(row, columns)
    if value is None:
        raise CorpusError(
            f"row {row.number} of {row.file!r} has none of the columns {', '.join(columns)} "
            f"(it has {', '.join(row.values)}); give rows of files of repositories"
        )
    return value
