"""Nearest keys: exact and approximate search behind one contract. Knows tensors, not models."""

from memorizing.knn.exact import search_exact
from memorizing.knn.index import KeyIndex, StoredKeys, check_queries
from memorizing.knn.making import make_index
from memorizing.knn.neighbors import Neighbors
from memorizing.knn.product import is_emulated, multiplies_bf16
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
