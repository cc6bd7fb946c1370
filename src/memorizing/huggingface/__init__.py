"""Memory for the models of `transformers`."""

from memorizing.huggingface.attachment import add_memory, remove_memory
from memorizing.huggingface.memory_settings import MemorySettings
from memorizing.huggingface.session import MemorySession, open_memory

__all__ = ["MemorySession", "MemorySettings", "add_memory", "open_memory", "remove_memory"]
