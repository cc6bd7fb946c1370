"""Memory for the models of `transformers`."""

from memorizing.huggingface.adapter import load_adapter, save_adapter
from memorizing.huggingface.attachment import add_memory, remove_memory
from memorizing.huggingface.memory_settings import MemorySettings
from memorizing.huggingface.session import MemorySession, open_memory

__all__ = [
    "MemorySession",
    "MemorySettings",
    "add_memory",
    "load_adapter",
    "open_memory",
    "remove_memory",
    "save_adapter",
]
