"""C4(4K+): web pages of at least 4,096 tokens (Raffel et al. 2020; section 4.1 of the paper)."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import PurePosixPath

from memorizing.config import DataConfig
from memorizing.data.batch import Document
from memorizing.data.corpora.sources import C4
from memorizing.data.corpus import Corpus
from memorizing.data.reading.tables import (
    find_hub_files,
    find_row_files,
    find_text,
    find_value,
    parse_hub_place,
    read_rows,
)
from memorizing.data.text import ReadLog, encode_text, make_document

HUB_DATASET = "allenai/c4"
_HUB_PATTERN = "en/c4-train.*.json.gz"
MIN_TOKENS = 4096
"""The paper's least length of a document."""


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
    place_log = ReadLog()
    kind, _, dataset = where.partition(":")
    if kind == "hub":
        name, pattern = parse_hub_place(dataset) if dataset else (HUB_DATASET, _HUB_PATTERN)
        files = find_hub_files(name, [pattern], C4)
    else:
        files = find_row_files(where, place_log, C4)
    min_bytes = config.min_document_tokens or MIN_TOKENS

    def read(log: ReadLog) -> Iterator[Document]:
        log.skipped.extend(place_log.skipped)
        for row in read_rows(files, log):
            text = find_text(row, (config.text_column,)) or ""
            raw = text if isinstance(text, bytes) else encode_text(text)
            if len(raw) < min_bytes:
                log.pass_over(f"pages of fewer than {min_bytes:,} bytes")
                continue
            file = PurePosixPath(row.file).name.partition(".json")[0].removesuffix(".parquet")
            name = f"{find_value(row, ('url',)) or 'page'} ({file}:{row.number})"
            document = make_document(name, raw, log)
            if document is not None:
                yield document

    return Corpus(
        f"c4:{where}, {len(files.addresses)} files, pages of at least {min_bytes:,} bytes", read
    )
