"""Nearest keys: exact and approximate search behind one contract. Knows tensors, not models."""

from memorizing.knn.exact import search_exact
from memorizing.knn.index import KeyIndex, StoredKeys
from memorizing.knn.making import make_index
from memorizing.knn.neighbors import Neighbors

__all__ = ["KeyIndex", "Neighbors", "StoredKeys", "make_index", "search_exact"]
