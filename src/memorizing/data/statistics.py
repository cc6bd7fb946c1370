"""What a corpus holds: how many documents, bytes and tokens, and how long the documents are."""

from __future__ import annotations

import bisect
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from memorizing.config import DataConfig, TokenizerConfig
from memorizing.data.corpus import Corpus
from memorizing.data.splits import (
    NAMES_SHOWN,
    USES,
    SplitSize,
    join_documents,
    match_names,
    split_documents,
)
from memorizing.data.text import Document
from memorizing.data.tokenized import batch_documents
from memorizing.data.tokenizer import Tokenizer
from memorizing.data.tokenizer_training import train_tokenizer


@dataclass(frozen=True)
class DocumentSize:
    """A document by name, with its size."""

    name: str
    num_bytes: int
    num_tokens: int | None = None
    """None where it was not tokenized."""


@dataclass(frozen=True)
class LengthBin:
    """Documents of at least `begin` and fewer than `end` tokens."""

    begin: int
    end: int
    num_documents: int
    num_tokens: int


@dataclass(frozen=True)
class CorpusListing:
    """The first documents of a corpus."""

    description: str
    documents: tuple[DocumentSize, ...]
    is_complete: bool
    """Whether these are all."""
    skipped: tuple[str, ...]
    """What was left out until the last of them was read."""
    num_replaced: int
    """Files or rows with bytes that are not UTF-8."""
    splits: tuple[SplitSize, ...] = ()
    """All documents by their use; empty where that was not asked for, or all are trained on."""

    def to_dict(self) -> dict[str, Any]:
        """Plain nested values, for JSON."""
        return asdict(self)


@dataclass(frozen=True)
class CorpusStatistics:
    """What `measure_corpus` found."""

    description: str
    tokenizer: str
    """What the tokens are counted by."""
    num_documents: int
    num_bytes: int
    num_tokens: int
    median_tokens: int
    """Half of the documents have this many tokens or fewer."""
    histogram: tuple[LengthBin, ...]
    """From the shortest document to the longest; each bin is twice as wide as the one before."""
    longest: tuple[DocumentSize, ...]
    shortest: tuple[DocumentSize, ...]
    skipped: tuple[str, ...]
    num_replaced: int
    splits: tuple[SplitSize, ...] = ()
    """The documents by their use; empty where that was not asked for, or all are trained on."""

    def to_dict(self) -> dict[str, Any]:
        """Plain nested values, for JSON."""
        return asdict(self)


def list_documents(corpus: Corpus, count: int, config: DataConfig | None = None) -> CorpusListing:
    """The first documents with their bytes; no more are read than asked for, but for one.

    With a `config` that holds documents out or excludes some, all are read, to say how many have
    which use; no text is kept.

    Raises:
        CorpusError: as `Corpus.documents` and `load_splits`.
        ConfigError: as `load_splits`.
    """
    config = _drop_plain(config)
    sizes: list[DocumentSize] = []
    for document in corpus.documents():
        sizes.append(DocumentSize(document.name, document.num_bytes))
        if len(sizes) > count and not config:
            break
    return CorpusListing(
        corpus.description,
        tuple(sizes[:count]),
        len(sizes) <= count,
        tuple(corpus.skipped),
        corpus.num_replaced,
        _measure_splits(sizes, config) if config else (),
    )


def choose_tokenizer(corpus: Corpus, config: TokenizerConfig) -> tuple[Tokenizer, str]:
    """A tokenizer to count a corpus by, and a line that says which.

    It is the existing one that `config` names, or is trained on the first documents of the corpus:
    as many as have `config.sample_mib` of text. (Training a model instead takes its sample evenly
    from all training documents, which it has in memory; here only the sample is.)

    Raises:
        CorpusError: as `Corpus.documents`.
        TokenizerError: an existing tokenizer that is not there.
    """
    if config.kind == "pretrained":
        tokenizer = train_tokenizer([], config)
        return tokenizer, f"{config.path}, {tokenizer.vocab_size:,} ids"
    sample: list[Document] = []
    num_bytes = 0
    for document in corpus.documents():
        sample.append(document)
        num_bytes += document.num_bytes
        if num_bytes >= config.sample_mib * 2**20:
            break
    tokenizer = train_tokenizer(sample, config)
    return tokenizer, (
        f"{config.kind}, {tokenizer.vocab_size:,} ids, trained on the first {len(sample):,} "
        f"documents ({num_bytes / 1e6:,.1f} MB)"
    )


def measure_corpus(
    corpus: Corpus,
    tokenizer: Tokenizer,
    tokenizer_name: str = "",
    config: DataConfig | None = None,
    *,
    num_extremes: int = 5,
    progress: Callable[[int], None] | None = None,
) -> CorpusStatistics:
    """Read a corpus once and count it; no text is kept.

    The histogram is that of the paper's appendix A: documents by length in tokens, on a logarithmic
    axis.

    Args:
        corpus: what to read.
        tokenizer: what to count by. Start tokens are not counted.
        tokenizer_name: what the result calls it.
        config: where it holds documents out or excludes some, the result has the sizes of the
            splits too. All other numbers are of the whole corpus.
        num_extremes: how many of the longest and shortest documents are named.
        progress: called with the number of documents done so far.

    Raises:
        CorpusError: as `Corpus.documents` and, with `config`, `load_splits`.
        ConfigError: as `load_splits`.
    """
    config = _drop_plain(config)
    sizes: list[DocumentSize] = []
    for batch in batch_documents(corpus.documents()):
        encoded = tokenizer.encode_batch([document.text for document in batch])
        sizes += [
            DocumentSize(document.name, document.num_bytes, len(tokens))
            for document, tokens in zip(batch, encoded, strict=True)
        ]
        if progress:
            progress(len(sizes))
    lengths = sorted(size.num_tokens or 0 for size in sizes)
    return CorpusStatistics(
        description=corpus.description,
        tokenizer=tokenizer_name or f"{tokenizer.vocab_size:,} ids",
        num_documents=len(sizes),
        num_bytes=sum(size.num_bytes for size in sizes),
        num_tokens=sum(lengths),
        median_tokens=lengths[(len(lengths) - 1) // 2],
        histogram=_make_histogram(lengths),
        longest=tuple(sorted(sizes, key=lambda s: -(s.num_tokens or 0))[:num_extremes]),
        shortest=tuple(sorted(sizes, key=lambda s: s.num_tokens or 0)[:num_extremes]),
        skipped=tuple(corpus.skipped),
        num_replaced=corpus.num_replaced,
        splits=_measure_splits(sizes, config) if config else (),
    )


def _drop_plain(config: DataConfig | None) -> DataConfig | None:
    """The settings, or None where they have all documents trained on."""
    if config and (config.validation or config.test or config.exclude or config.held_out_share):
        return config
    return None


def _measure_splits(sizes: Sequence[DocumentSize], config: DataConfig) -> tuple[SplitSize, ...]:
    """What `load_splits` makes of these documents, without their text."""
    by_name = {size.name: size for size in sizes}
    excluded = match_names(list(by_name), config.exclude, "data.exclude")
    split = split_documents([name for name in by_name if name not in excluded], config)

    def measure(use: str, names: Sequence[str], folders_per_document: int) -> SplitSize:
        documents = [Document(name, "", by_name[name].num_bytes) for name in names]
        joined = join_documents(documents, folders_per_document, config.seed)
        tokens = [by_name[name].num_tokens for name in names]
        known = [count for count in tokens if count is not None]
        return SplitSize(
            use,
            len(joined),
            sum(document.num_bytes for document in documents),
            sum(known) if len(known) == len(tokens) else None,
            tuple(document.name for document in joined[:NAMES_SHOWN]),
        )

    found = [measure(use, getattr(split, use), config.folders_per_document) for use in USES]
    if excluded:
        found.append(measure("excluded", [name for name in by_name if name in excluded], 1))
    return tuple(found)


def _make_histogram(lengths: Sequence[int]) -> tuple[LengthBin, ...]:
    """Bins between powers of two, of lengths that are sorted; empty ones in between are kept."""
    bins = []
    for bits in range(lengths[0].bit_length(), lengths[-1].bit_length() + 1):
        begin, end = 1 << bits >> 1, 1 << bits
        inside = lengths[bisect.bisect_left(lengths, begin) : bisect.bisect_left(lengths, end)]
        bins.append(LengthBin(begin, end, len(inside), sum(inside)))
    return tuple(bins)
