"""Which documents are held out, settled by name before anything is joined or cut."""

from __future__ import annotations

import fnmatch
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

from memorizing.config import DataConfig
from memorizing.data.corpora.kinds import load_corpus
from memorizing.data.text import Document, hash_name, shuffle_names
from memorizing.errors import ConfigError, CorpusError
from memorizing.settings import find_nearest

USES = ("train", "validation", "test")
NAMES_SHOWN = 4


@dataclass(frozen=True)
class Split:
    """Names of documents by their use, each in the order given."""

    train: tuple[str, ...]
    validation: tuple[str, ...]
    test: tuple[str, ...]


@dataclass(frozen=True)
class SplitSize:
    """How much of a corpus has one use."""

    use: str
    """`train`, `validation`, `test`, or `excluded`."""
    num_documents: int
    """As they are trained on: after `data.folders_per_document` joined them."""
    num_bytes: int
    num_tokens: int | None
    """None where they were not tokenized."""
    first_names: tuple[str, ...]

    def describe(self) -> str:
        """A line to print."""
        more = ", ..." if self.num_documents > len(self.first_names) else ""
        tokens = "" if self.num_tokens is None else f", {self.num_tokens:,} tokens"
        names = f" ({', '.join(self.first_names)}{more})" if self.first_names else ""
        size = f"{self.num_documents:,} documents, {self.num_bytes / 1e6:.1f} MB"
        return f"{self.use}: {size}{tokens}{names}"


@dataclass(frozen=True)
class Splits:
    """The documents of a corpus by their use, and what happened while they were read."""

    train: list[Document]
    validation: list[Document]
    test: list[Document]
    description: str
    """The corpus, in one line."""
    skipped: tuple[str, ...]
    """One line per thing that was left out, with the reason."""
    num_replaced: int
    """Files or rows with bytes that are not UTF-8."""

    def describe(self) -> list[str]:
        """Lines to print: the corpus, each split, what was replaced and left out."""
        lines = [self.description]
        for use in USES:
            documents: list[Document] = getattr(self, use)
            names = tuple(document.name for document in documents)
            size = sum(document.num_bytes for document in documents)
            lines.append(SplitSize(use, len(documents), size, None, names[:NAMES_SHOWN]).describe())
        if self.num_replaced:
            lines.append(
                f"{self.num_replaced} files held bytes that are not UTF-8; they were replaced by "
                "U+FFFD"
            )
        if self.skipped:
            shown = "; ".join(self.skipped[:4]) + ("; ..." if len(self.skipped) > 4 else "")
            lines.append(f"left out {len(self.skipped)}: {shown}")
        return lines

    @property
    def fingerprint(self) -> str:
        """SHA-256 of all names and texts by split: says whether two runs read the same."""
        digest = hashlib.sha256()
        for use in USES:
            for document in getattr(self, use):
                digest.update(f"{use}\0{document.name}\0{len(document.text)}\0".encode())
                digest.update(document.text.encode())
        return digest.hexdigest()


def load_splits(config: DataConfig) -> Splits:
    """Read a corpus, hold documents out, then join folders inside each split.

    The split is by folder where `folders_per_document` joins them, so that a held-out folder never
    shares a document with one that is trained on.

    Raises:
        CorpusError: the corpus is unknown or empty, or a pattern of held-out or excluded documents
            matches no name.
        ConfigError: documents are held out both by names and by share.
    """
    corpus = load_corpus(config)
    by_name = {document.name: document for document in corpus.documents()}
    for name in match_names(list(by_name), config.exclude, "data.exclude"):
        del by_name[name]
    split = split_documents(list(by_name), config)

    def gather(names: Sequence[str]) -> list[Document]:
        return join_documents(
            [by_name[name] for name in names], config.folders_per_document, config.seed
        )

    return Splits(
        gather(split.train),
        gather(split.validation),
        gather(split.test),
        corpus.description,
        tuple(corpus.skipped),
        corpus.num_replaced,
    )


def split_documents(names: Sequence[str], config: DataConfig) -> Split:
    """Hold names out by the patterns of `config`, or a share by hash, half validation, half test.

    A hash depends on the name alone: more documents, or another order, never move one across.

    Raises:
        CorpusError: a pattern matches no name (with the nearest), or validation and test share a
            name.
        ConfigError: both patterns and a share are given.
    """
    if config.held_out_share and (config.validation or config.test):
        raise ConfigError(
            f"data.held_out_share is {config.held_out_share}, but data.validation or data.test "
            "name documents; use the names (share 0) or the share (no names)"
        )
    if config.held_out_share:
        places = {name: hash_name(name) / 2**64 for name in names}
        share = config.held_out_share
        validation = {name for name in names if places[name] < share / 2}
        test = {name for name in names if share / 2 <= places[name] < share}
    else:
        validation = match_names(names, config.validation, "data.validation")
        test = match_names(names, config.test, "data.test")
    if both := sorted(validation & test):
        raise CorpusError(
            f"{both[0]!r} is in both data.validation and data.test; a document has one use"
        )
    return Split(
        tuple(name for name in names if name not in validation and name not in test),
        tuple(name for name in names if name in validation),
        tuple(name for name in names if name in test),
    )


def match_names(names: Sequence[str], patterns: Sequence[str], key: str) -> set[str]:
    """The names that are a pattern, or match one.

    Args:
        names: of documents.
        patterns: names or shell patterns.
        key: the setting that holds them, for the error.

    Raises:
        CorpusError: a pattern that matches no name, with the nearest.
    """
    matched: set[str] = set()
    for pattern in patterns:
        found = {name for name in names if name == pattern or fnmatch.fnmatchcase(name, pattern)}
        if not found:
            raise CorpusError(
                f"{key} names {pattern!r}, which no document matches; "
                f"{find_nearest(pattern, names)} Name documents of this corpus, or none ({key}=)"
            )
        matched |= found
    return matched


def join_documents(documents: Sequence[Document], count: int, seed: int) -> list[Document]:
    """Join `count` documents at a time into one, named `a+b+c`.

    The order follows from the seed and the names, not from the order given. The last document has
    what is left over. `count` 1 returns the documents as they are.
    """
    if count == 1:
        return list(documents)
    by_name = {document.name: document for document in documents}
    order = shuffle_names(by_name, seed)
    groups = [[by_name[name] for name in order[i : i + count]] for i in range(0, len(order), count)]
    return [
        Document(
            "+".join(d.name for d in group),
            "".join(d.text for d in group),
            sum(d.num_bytes for d in group),
        )
        for group in groups
    ]
