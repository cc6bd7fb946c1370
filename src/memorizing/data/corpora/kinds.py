"""The kinds of corpora there are, and a corpus by its specification `kind:where`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from memorizing.config import DataConfig
from memorizing.data.corpora import arxiv, folders, isabelle, table_corpora
from memorizing.data.corpus import Corpus
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
    default: str = ""
    """The place that is meant where only the kind is written; empty: a place must be given."""
    source: str = ""
    """What to download, and how large it is."""


CORPUS_KINDS: dict[str, CorpusKind] = {
    "python": CorpusKind(
        "python:NAME[,NAME...]",
        "installed distributions, a document each; 'stdlib' is the standard library",
        folders.open_distributions,
    ),
    "subpackages": CorpusKind(
        "subpackages:PACKAGE",
        "direct subfolders of an installed package",
        folders.open_subpackages,
        has_folders=True,
    ),
    "files": CorpusKind(
        "files:PATH",
        "text files of a folder, or of a pattern such as books/*.txt, a document each",
        folders.open_files,
    ),
    "repositories": CorpusKind(
        "repositories:PATH",
        "subfolders of a folder, the text files of each joined in random order",
        folders.open_repositories,
        has_folders=True,
    ),
    "jsonl": CorpusKind(
        "jsonl:PATH",
        "rows of JSON lines, a document each, text in data.text_column",
        table_corpora.open_jsonl,
    ),
    "parquet": CorpusKind(
        "parquet:PATH",
        "rows of Parquet files, a document each, text in data.text_column",
        table_corpora.open_parquet,
    ),
    "pg19": CorpusKind(
        "pg19[:PATH]",
        "PG-19, a document per book: from the hub, or as DeepMind publishes it",
        table_corpora.open_pg19,
        default="hub",
        source=table_corpora.PG19_SOURCE,
    ),
    "c4": CorpusKind(
        "c4[:PATH]",
        "C4(4K+), web pages of at least 4,096 tokens: from the hub, or files c4-train.*.json.gz",
        table_corpora.open_c4,
        default="hub",
        source=table_corpora.C4_SOURCE,
    ),
    "arxiv": CorpusKind(
        "arxiv[:PATH]",
        "LaTeX of papers on Mathematics: arXiv_src_*.tar with arXiv's metadata, or from the hub",
        arxiv.open_arxiv,
        default="hub",
        source=arxiv.ARXIV_SOURCE,
    ),
    "github": CorpusKind(
        "github:PATH",
        "repositories: checkouts, or rows of files (also hub:OWNER/NAME) brought together",
        table_corpora.open_github,
        has_folders=True,
        source=table_corpora.GITHUB_SOURCE,
    ),
    "isabelle": CorpusKind(
        "isabelle:PATH",
        "Isabelle theories in import order, a document per session directory: the AFP or src/HOL",
        isabelle.open_isabelle,
        source=isabelle.ISABELLE_SOURCE,
    ),
}


def find_kind(corpus: str) -> CorpusKind:
    """The kind of a corpus that is written `kind:where`, or `kind` alone.

    Raises:
        CorpusError: it is not known (with the nearest), or none is written.
    """
    kind, separator, _ = corpus.partition(":")
    kinds = list(CORPUS_KINDS)
    if kind in CORPUS_KINDS:
        return CORPUS_KINDS[kind]
    if not separator:
        raise CorpusError(
            f"corpus {corpus!r} has no kind; write kind:where with one of the kinds "
            f"{', '.join(kinds)}"
        )
    raise CorpusError(
        f"unknown kind of corpus {kind!r}; {find_nearest(kind, kinds)} (kinds: {', '.join(kinds)})"
    )


def load_corpus(config: DataConfig) -> Corpus:
    """The corpus that `config.corpus` names; nothing is read yet but the lists of names.

    Reading stops after `config.max_documents`.

    Raises:
        CorpusError: unknown kind (with the nearest), or a place, package or column that does not
            exist.
    """
    entry = find_kind(config.corpus)
    kind, separator, where = config.corpus.partition(":")
    where = where if separator else entry.default
    if not where:
        source = f". {entry.source[:1].upper()}{entry.source[1:]}" if entry.source else ""
        raise CorpusError(
            f"corpus {config.corpus!r} names nothing after '{kind}:'; write {entry.usage}{source}"
        )
    if config.folders_per_document > 1 and not entry.has_folders:
        folders = " and ".join(
            f"{name}:" for name, other in CORPUS_KINDS.items() if other.has_folders
        )
        raise CorpusError(
            f"data.folders_per_document is {config.folders_per_document} with the corpus "
            f"{config.corpus!r}; only {folders} have folders to join: set it to 1"
        )
    return entry.open(where, config).take(config.max_documents)
