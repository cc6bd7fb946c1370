"""Documents from corpora, tokenizers, and segments of documents in rows."""

from memorizing.data.corpora.kinds import CORPUS_KINDS, CorpusKind, load_corpus
from memorizing.data.corpus import Corpus
from memorizing.data.loader import RowLoader, SegmentBatch, SegmentLoader
from memorizing.data.splits import Split, Splits, join_documents, load_splits, split_documents
from memorizing.data.statistics import (
    CorpusListing,
    CorpusStatistics,
    DocumentSize,
    LengthBin,
    choose_tokenizer,
    list_documents,
    measure_corpus,
)
from memorizing.data.text import Document
from memorizing.data.tokenized import (
    TokenizedDocument,
    cut_documents,
    take_beginnings,
    tokenize_documents,
)
from memorizing.data.tokenizer import Tokenizer, load_tokenizer
from memorizing.data.tokenizer_training import train_tokenizer

__all__ = [
    "CORPUS_KINDS",
    "Corpus",
    "CorpusKind",
    "CorpusListing",
    "CorpusStatistics",
    "Document",
    "DocumentSize",
    "LengthBin",
    "RowLoader",
    "SegmentBatch",
    "SegmentLoader",
    "Split",
    "Splits",
    "TokenizedDocument",
    "Tokenizer",
    "choose_tokenizer",
    "cut_documents",
    "join_documents",
    "list_documents",
    "load_corpus",
    "load_splits",
    "load_tokenizer",
    "measure_corpus",
    "split_documents",
    "take_beginnings",
    "tokenize_documents",
    "train_tokenizer",
]
