"""Memory for the models of `transformers`, and our own model as one of them.

Importing this makes our model known to `AutoConfig`, `AutoModelForCausalLM` and `AutoTokenizer`.
"""

from memorizing.huggingface.attaching.attachment import add_memory, remove_memory
from memorizing.huggingface.attaching.memory_settings import MemorySettings
from memorizing.huggingface.learning.adapter import load_adapter, save_adapter
from memorizing.huggingface.learning.calibration import Calibration, calibrate
from memorizing.huggingface.own_model.cache import MemorizingCache
from memorizing.huggingface.own_model.config import MemorizingTokenizer, MemorizingTransformerConfig
from memorizing.huggingface.own_model.model import MemorizingTransformerForCausalLM
from memorizing.huggingface.sessions.opening import open_memory
from memorizing.huggingface.sessions.session import MemorySession

__all__ = [
    "Calibration",
    "MemorizingCache",
    "MemorizingTokenizer",
    "MemorizingTransformerConfig",
    "MemorizingTransformerForCausalLM",
    "MemorySession",
    "MemorySettings",
    "add_memory",
    "calibrate",
    "load_adapter",
    "open_memory",
    "remove_memory",
    "save_adapter",
]
