"""A memory on disk: a folder of sealed segments that is searched, added to and shared."""

from memorizing.memory.disk.documents import LayerEntries, NewDocument, hash_text
from memorizing.memory.disk.folder import MemoryFolder
from memorizing.memory.disk.manifest import FolderDescription, StoredDocument

__all__ = [
    "FolderDescription",
    "LayerEntries",
    "MemoryFolder",
    "NewDocument",
    "StoredDocument",
    "hash_text",
]
