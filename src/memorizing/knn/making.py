"""From settings to an index; a library is imported only when an index of its own is made."""

from __future__ import annotations

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
from memorizing.knn.exact import ExactIndex
from memorizing.knn.index import KeyIndex
from memorizing.knn.int8 import Int8Index
from memorizing.knn.sealed import SealedIndex


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
