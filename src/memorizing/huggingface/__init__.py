"""Memory for the models of `transformers`, and our own model as one of them.

Names load when they are first used, and make our model known to `AutoConfig`,
`AutoModelForCausalLM` and `AutoTokenizer`. What needs no model, as a shard of a memory that is
served, does not wait for `transformers`, which takes seconds to import.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from memorizing.lazy import load_name

if TYPE_CHECKING:
    from memorizing.huggingface.attaching.attachment import add_memory, remove_memory
    from memorizing.huggingface.attaching.memory_settings import MemorySettings
    from memorizing.huggingface.learning.adapter import load_adapter, save_adapter
    from memorizing.huggingface.learning.calibration import Calibration, calibrate
    from memorizing.huggingface.own_model.cache import MemorizingCache
    from memorizing.huggingface.own_model.config import (
        MemorizingTokenizer,
        MemorizingTransformerConfig,
    )
    from memorizing.huggingface.own_model.model import MemorizingTransformerForCausalLM
    from memorizing.huggingface.sessions.opening import open_memory
    from memorizing.huggingface.sessions.session import MemorySession

_MODULE_OF_NAME = {
    "Calibration": "learning.calibration",
    "MemorizingCache": "own_model.cache",
    "MemorizingTokenizer": "own_model.config",
    "MemorizingTransformerConfig": "own_model.config",
    "MemorizingTransformerForCausalLM": "own_model.model",
    "MemorySession": "sessions.session",
    "MemorySettings": "attaching.memory_settings",
    "add_memory": "attaching.attachment",
    "calibrate": "learning.calibration",
    "load_adapter": "learning.adapter",
    "open_memory": "sessions.opening",
    "remove_memory": "attaching.attachment",
    "save_adapter": "learning.adapter",
}

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


def __getattr__(name: str) -> Any:
    """Load a public name from its module at first use (PEP 562)."""
    if name in _MODULE_OF_NAME:
        import_module(f"{__name__}.own_model.model")  # Which makes our model known.
    return load_name(__name__, name, _MODULE_OF_NAME)
