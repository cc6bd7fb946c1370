"""The store of one layer: rows, heads, ring of slots; and entries that are kept on disk."""

from memorizing.config import ModelConfig
from memorizing.memory.disk import (
    FolderDescription,
    MemoryFolder,
    NewDocument,
    StoredDocument,
    hash_text,
)
from memorizing.memory.frozen import FrozenMemory
from memorizing.memory.history import Entries, History, RetrievalControl
from memorizing.memory.retrieved import Retrieved, keep_best
from memorizing.memory.spread import SpreadMemory
from memorizing.memory.store import Memory

__all__ = [
    "Entries",
    "FolderDescription",
    "FrozenMemory",
    "History",
    "Memory",
    "MemoryFolder",
    "NewDocument",
    "RetrievalControl",
    "Retrieved",
    "SpreadMemory",
    "StoredDocument",
    "hash_text",
    "keep_best",
    "memory_bytes",
]

_ITEM_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}
_TOKEN_BYTES = 4


def memory_bytes(config: ModelConfig, num_rows: int, capacity: int) -> int:
    """Bytes that the full memories of a state take, all memory layers: keys, values and tokens."""
    per_entry = 2 * config.num_heads * config.head_dim * _ITEM_BYTES[config.memory_dtype]
    per_entry += _TOKEN_BYTES if config.pointer else 0
    return len(config.memory_layers) * num_rows * capacity * per_entry
