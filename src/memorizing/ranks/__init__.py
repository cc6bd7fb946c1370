"""Several processes that train or evaluate as one: `torchrun` or `accelerate launch`.

A *rank* is one of them, by its number from 0. All have the same weights and read the same list of
documents; each reads rows, or documents, of its own. What is summed over all of them is the
gradient, the nats and a few counts. A memory stays with its row.
"""

from memorizing.ranks.group import ALONE, Ranks, hash_tensors
from memorizing.ranks.joining import find_world, join_ranks
from memorizing.ranks.sharding import Shards

__all__ = ["ALONE", "Ranks", "Shards", "find_world", "hash_tensors", "join_ranks"]
