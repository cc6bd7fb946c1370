"""From settings to an index; a library is imported only when an index of its own is made."""

from __future__ import annotations

from memorizing.errors import ConfigError
from memorizing.index_settings import ExactSettings, IndexSettings
from memorizing.knn.exact import ExactIndex
from memorizing.knn.index import KeyIndex


def make_index(settings: IndexSettings) -> KeyIndex:
    """An empty index of these settings.

    Raises:
        IndexUnavailableError: the package it needs is not installed; the message has the command.
    """
    if isinstance(settings, ExactSettings):
        return ExactIndex(settings)
    raise ConfigError(f"no index is made for {settings}")
