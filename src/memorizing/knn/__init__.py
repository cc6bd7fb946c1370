"""Nearest keys: exact and approximate search behind one contract. Knows tensors, not models."""

from memorizing.errors import ConfigError
from memorizing.index_settings import (
    BucketSettings,
    ExactSettings,
    IndexSettings,
    Int8Settings,
    ScannSettings,
    SealedSettings,
)
from memorizing.knn.buckets import BucketIndex
from memorizing.knn.index import (
    ExactIndex,
    KeyIndex,
    Neighbors,
    StoredKeys,
    check_queries,
    search_exact,
)
from memorizing.knn.int8 import Int8Index
from memorizing.knn.packed import is_emulated, multiplies_bf16
from memorizing.knn.recall import recall_at_k
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
    "search_exact",
]


def make_index(settings: IndexSettings) -> KeyIndex:
    """An empty index of these settings.

    Raises:
        IndexUnavailableError: the package it needs is not installed; the message has the command.
    """
    if isinstance(settings, ExactSettings):
        return ExactIndex(settings)
    if isinstance(settings, BucketSettings):
        return BucketIndex(settings)
    if isinstance(settings, Int8Settings):
        return Int8Index(settings)
    if isinstance(settings, ScannSettings):
        from memorizing.knn.scann_blocks import ScannLibrary

        return SealedIndex(settings, ScannLibrary(settings))
    if isinstance(settings, SealedSettings):
        from memorizing.knn.faiss_blocks import FaissLibrary

        return SealedIndex(settings, FaissLibrary(settings))
    raise ConfigError(f"no index is made for {settings}")
