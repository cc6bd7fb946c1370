"""The model: local attention, memory attention, gate, blocks, and the history they read."""

from memorizing.memory import RetrievalControl
from memorizing.model.layout import Exposed, ModelState, join_exposed
from memorizing.model.transformer import (
    MemorizingTransformer,
    ModelOutput,
    Retrieval,
    evaluation_mode,
)

__all__ = [
    "Exposed",
    "MemorizingTransformer",
    "ModelOutput",
    "ModelState",
    "Retrieval",
    "RetrievalControl",
    "evaluation_mode",
    "join_exposed",
]
