"""Repositories as documents: a folder of checkouts, or scattered rows with a repository's name."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import PurePosixPath

from memorizing.config import DataConfig
from memorizing.data.corpora.folders import open_repositories
from memorizing.data.corpora.spill import SpillStore
from memorizing.data.corpus import Corpus
from memorizing.data.reading.files import locate
from memorizing.data.reading.tables import (
    ROW_SUFFIXES,
    Row,
    RowFiles,
    find_rows,
    find_text,
    find_value,
    read_rows,
)
from memorizing.data.text import Document, ReadLog, concatenate_texts, is_binary, shuffle_tree
from memorizing.errors import CorpusError

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

    def read(log: ReadLog) -> Iterator[Document | None]:
        with SpillStore() as store:
            _gather(files, store, config.text_column, log)
            for repository in store.list_groups():
                paths = [PurePosixPath(name) for name in store.list_names(repository)]
                ordered = shuffle_tree(paths, f"{config.seed}/{repository}")
                texts = ((name, store.read(repository, str(name))) for name in ordered)
                yield concatenate_texts(repository, texts, log)

    return Corpus(f"github:{where}, {len(files.addresses)} files of rows", read, found=found)


def _gather(files: RowFiles, store: SpillStore, text_column: str, log: ReadLog) -> None:
    columns = TEXT_COLUMNS if text_column == "text" else (text_column,)
    for row in read_rows(files, log):
        repository = _require_value(row, REPOSITORY_COLUMNS)
        # As a plain relative path, so that equal ones are equal: `./a` is `a`.
        name = str(PurePosixPath(_require_value(row, PATH_COLUMNS)))
        raw = find_text(row, columns)
        if is_binary(raw):
            log.skip(f"{name} in {repository}", "binary")
        elif raw:
            store.add(repository, name, raw)


def _require_value(row: Row, columns: tuple[str, ...]) -> str:
    value = find_value(row, columns)
    if value is None:
        raise CorpusError(
            f"row {row.number} of {row.file!r} has none of the columns {', '.join(columns)} "
            f"(it has {', '.join(row.values)}); give rows of files of repositories"
        )
    return value
