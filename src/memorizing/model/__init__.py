"""The model: local attention, memory attention, gate, blocks, and the history they read."""

from memorizing.memory import RetrievalControl
from memorizing.model.exposure import Exposed, join_exposed
from memorizing.model.inference import evaluation_mode
from memorizing.model.state import ModelState
from memorizing.model.transformer import MemorizingTransformer, ModelOutput, Retrieval

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
