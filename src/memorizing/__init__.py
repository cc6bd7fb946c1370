"""Transformer language models with a memory they read by k-nearest-neighbor attention.

*Memorizing Transformers* (Wu, Rabe, Hutchins, Szegedy; ICLR 2022). Names load when they are first
used, so that importing the package, and `memorizing --help`, does not wait for torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from memorizing.lazy import load_name

__version__ = "0.1.0"

if TYPE_CHECKING:
    from memorizing.config import (
        Config,
        DataConfig,
        EvaluationConfig,
        ModelConfig,
        TokenizerConfig,
        TrainingConfig,
        list_recipes,
        load_config,
    )
    from memorizing.data import Corpus, Document, load_corpus
    from memorizing.errors import (
        CheckpointError,
        ConfigError,
        CorpusError,
        IndexUnavailableError,
        MemorizingError,
        MemoryFolderError,
        NonFiniteLossError,
        NonFiniteQueryError,
        ResourceError,
        RunFolderError,
        StateError,
        TokenizerError,
    )
    from memorizing.evaluation import EvaluationResult, evaluate_documents, evaluate_model
    from memorizing.huggingface import (
        Calibration,
        MemorizingTransformerForCausalLM,
        MemorySession,
        MemorySettings,
        add_memory,
        calibrate,
        load_adapter,
        remove_memory,
        save_adapter,
    )
    from memorizing.model import MemorizingTransformer, ModelOutput, ModelState
    from memorizing.opening import open_memory
    from memorizing.training import FinetuneSettings, finetune, load_model, train

_MODULE_OF_NAME = {
    name: module
    for module, names in {
        "config": (
            "Config DataConfig EvaluationConfig ModelConfig TokenizerConfig TrainingConfig "
            "list_recipes load_config"
        ),
        "data": "Corpus Document load_corpus",
        "errors": (
            "CheckpointError ConfigError CorpusError IndexUnavailableError MemorizingError "
            "MemoryFolderError NonFiniteLossError NonFiniteQueryError ResourceError "
            "RunFolderError StateError TokenizerError"
        ),
        "evaluation": "EvaluationResult evaluate_documents evaluate_model",
        "huggingface": (
            "Calibration MemorizingTransformerForCausalLM MemorySession MemorySettings "
            "add_memory calibrate load_adapter remove_memory save_adapter"
        ),
        "opening": "open_memory",
        "model": "MemorizingTransformer ModelOutput ModelState",
        "training": "FinetuneSettings finetune load_model train",
    }.items()
    for name in names.split()
}

__all__ = [
    "Calibration",
    "CheckpointError",
    "Config",
    "ConfigError",
    "Corpus",
    "CorpusError",
    "DataConfig",
    "Document",
    "EvaluationConfig",
    "EvaluationResult",
    "FinetuneSettings",
    "IndexUnavailableError",
    "MemorizingError",
    "MemorizingTransformer",
    "MemorizingTransformerForCausalLM",
    "MemoryFolderError",
    "MemorySession",
    "MemorySettings",
    "ModelConfig",
    "ModelOutput",
    "ModelState",
    "NonFiniteLossError",
    "NonFiniteQueryError",
    "ResourceError",
    "RunFolderError",
    "StateError",
    "TokenizerConfig",
    "TokenizerError",
    "TrainingConfig",
    "__version__",
    "add_memory",
    "calibrate",
    "evaluate_documents",
    "evaluate_model",
    "finetune",
    "list_recipes",
    "load_adapter",
    "load_config",
    "load_corpus",
    "load_model",
    "open_memory",
    "remove_memory",
    "save_adapter",
    "train",
]


def __getattr__(name: str) -> Any:
    """Load a public name from its module at first use (PEP 562)."""
    return load_name(__name__, name, _MODULE_OF_NAME)


def __dir__() -> list[str]:
    """Public names, loaded or not."""
    return sorted({*globals(), *__all__})
