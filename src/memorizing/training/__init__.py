"""Training: optimizers and schedules, the loop, checkpoints, run folders."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from memorizing.terminal import Display, LineDisplay, SilentDisplay, make_display
from memorizing.training.checkpoint import (
    LoadedModel,
    find_checkpoint,
    list_checkpoints,
    load_model,
    save_model,
)
from memorizing.training.precision import Precision, choose_precision
from memorizing.training.reporting import StepMetrics, TrainingResult, read_metrics
from memorizing.training.resources import (
    check_resources,
    count_weights,
    estimate_needs,
    measure_available,
    measure_share,
)
from memorizing.training.run_folder import read_run_config
from memorizing.training.train import TokenizedCorpus, prepare_corpus, train
from memorizing.training.trainer import Trainer

if TYPE_CHECKING:
    from memorizing.training.finetuning import FinetuneSettings, finetune

__all__ = [
    "Display",
    "FinetuneSettings",
    "LineDisplay",
    "LoadedModel",
    "Precision",
    "SilentDisplay",
    "StepMetrics",
    "TokenizedCorpus",
    "Trainer",
    "TrainingResult",
    "check_resources",
    "choose_precision",
    "count_weights",
    "estimate_needs",
    "find_checkpoint",
    "finetune",
    "list_checkpoints",
    "load_model",
    "make_display",
    "measure_available",
    "measure_share",
    "prepare_corpus",
    "read_metrics",
    "read_run_config",
    "save_model",
    "train",
]


def __getattr__(name: str) -> Any:
    """Load what needs `transformers` at first use (PEP 562): its import takes seconds."""
    if name in ("FinetuneSettings", "finetune"):
        from memorizing.training import finetuning

        return getattr(finetuning, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
