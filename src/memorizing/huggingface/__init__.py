"""Memory for the models of `transformers`, and our own model as one of them.

Importing this makes our model known to `AutoConfig`, `AutoModelForCausalLM` and `AutoTokenizer`.
"""

from memorizing.huggingface.adapter import load_adapter, save_adapter
from memorizing.huggingface.attachment import add_memory, remove_memory
from memorizing.huggingface.calibration import Calibration, calibrate
from memorizing.huggingface.memory_settings import MemorySettings
from memorizing.huggingface.own_cache import MemorizingCache
from memorizing.huggingface.own_config import MemorizingTransformerConfig
from memorizing.huggingface.own_model import MemorizingTransformerForCausalLM
from memorizing.huggingface.own_tokenizer import MemorizingTokenizer
from memorizing.huggingface.session import MemorySession, open_memory

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
