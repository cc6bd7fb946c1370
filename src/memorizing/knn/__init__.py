"""Nearest keys: exact and approximate search behind one contract. Knows tensors, not models."""

from memorizing.index_settings import (
    BucketSettings,
    ExactSettings,
    IndexSettings,
    Int8Settings,
    ScannSettings,
    SealedSettings,
)
from memorizing.knn.buckets import BucketIndex
from memorizing.knn.faiss_blocks import FaissLibrary
from memorizing.knn.index import (
    ExactIndex,
    KeyIndex,
    Neighbors,
    StoredKeys,
    check_queries,
)
from memorizing.knn.int8 import Int8Index
from memorizing.knn.packed import is_emulated, multiplies_bf16
from memorizing.knn.recall import recall_at_k
from memorizing.knn.scann_blocks import ScannLibrary
from memorizing.knn.sealed import SealedIndex

__all__ = [
    "KeyIndex",
    "Neighbors",
    "SealedIndex",
    "StoredKeys",
    "check_queries",
    "is_emulated",
    "make_index",
    "multiplies_bf16",
    "recall_at_k",
]


_MADE_BY = {ExactSettings: ExactIndex, BucketSettings: BucketIndex, Int8Settings: Int8Index}


def make_index(settings: IndexSettings) -> KeyIndex:
    """An empty index of these settings; a library is imported only when an index of it is made.

    Raises:
        IndexUnavailableError: the package it needs is not installed; the message has the command.
    """
    if isinstance(settings, SealedSettings):
        is_scann = isinstance(settings, ScannSettings)
        library = ScannLibrary(settings) if is_scann else FaissLibrary(settings)
        return SealedIndex(settings, library)
    return _MADE_BY[type(settings)](settings)
