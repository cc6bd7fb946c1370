"""Nearest keys: exact search and its typed result. Knows tensors, not models."""

from memorizing.knn.exact import search_exact
from memorizing.knn.neighbors import Neighbors

__all__ = ["Neighbors", "search_exact"]
