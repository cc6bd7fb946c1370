"""The kinds of corpora there are, and a corpus by its specification `kind:where`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from memorizing.config import DataConfig
from memorizing.data.corpus import Corpus
from memorizing.data.folder_corpora import open_files, open_repositories
from memorizing.data.python_corpora import open_distributions, open_subpackages
from memorizing.data.table_corpora import open_jsonl, open_parquet
from memorizing.errors import CorpusError
from memorizing.settings import find_nearest


@dataclass(frozen=True)
class CorpusKind:
    """How corpora of one kind are written and opened."""

    usage: str
    summary: str
    open: Callable[[str, DataConfig], Corpus]
    has_folders: bool = False
    """Whether its documents are folders, which `folders_per_document` can join."""


CORPUS_KINDS: dict[str, CorpusKind] = {
    "python": CorpusKind(
        "python:NAME[,NAME...]",
        "installed distributions, a document each; 'stdlib' is the standard library",
        open_distributions,
    ),
    "subpackages": CorpusKind(
        "subpackages:PACKAGE",
        "direct subfolders of an installed package",
        open_subpackages,
        has_folders=True,
    ),
    "files": CorpusKind(
        "files:PATH",
        "text files of a folder, or of a pattern such as books/*.txt, a document each",
        open_files,
    ),
    "repositories": CorpusKind(
        "repositories:PATH",
        "subfolders of a folder, the text files of each joined in random order",
        open_repositories,
        has_folders=True,
    ),
    "jsonl": CorpusKind(
        "jsonl:PATH", "rows of JSON lines, a document each, text in data.text_column", open_jsonl
    ),
    "parquet": CorpusKind(
        "parquet:PATH",
        "rows of Parquet files, a document each, text in data.text_column",
        open_parquet,
    ),
}


def load_corpus(config: DataConfig) -> Corpus:
    """The corpus that `config.corpus` names; nothing is read yet but the lists of names.

    Raises:
        CorpusError: unknown kind (with the nearest), or a place, package or column that does not
            exist.
    """
    kind, separator, where = config.corpus.partition(":")
    kinds = list(CORPUS_KINDS)
    if not separator:
        raise CorpusError(
            f"corpus {config.corpus!r} has no kind; write kind:where with one of the kinds "
            f"{', '.join(kinds)}"
        )
    if kind not in CORPUS_KINDS:
        raise CorpusError(
            f"unknown kind of corpus {kind!r}; {find_nearest(kind, kinds)} (kinds: "
            f"{', '.join(kinds)})"
        )
    entry = CORPUS_KINDS[kind]
    if not where:
        raise CorpusError(
            f"corpus {config.corpus!r} names nothing after '{kind}:'; write {entry.usage}"
        )
    if config.folders_per_document > 1 and not entry.has_folders:
        folders = " and ".join(
            f"{name}:" for name, other in CORPUS_KINDS.items() if other.has_folders
        )
        raise CorpusError(
            f"data.folders_per_document is {config.folders_per_document} with the corpus "
            f"{config.corpus!r}; only {folders} have folders to join: set it to 1"
        )
    return entry.open(where, config)
