"""Perplexity over whole documents: with a memory of any capacity, without, and with a wrong one."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from memorizing.evaluation.reading import (
    Progress,
    check_capacities,
    evaluate_capacities,
    evaluate_documents,
)
from memorizing.evaluation.results import (
    Control,
    DocumentResult,
    EvaluationResult,
    compare_results,
)

if TYPE_CHECKING:
    from memorizing.evaluation.pretrained import evaluate_model

__all__ = [
    "Control",
    "DocumentResult",
    "EvaluationResult",
    "Progress",
    "check_capacities",
    "compare_results",
    "evaluate_capacities",
    "evaluate_documents",
    "evaluate_model",
]


def __getattr__(name: str) -> Any:
    """Load what needs `transformers` at first use (PEP 562): its import takes seconds."""
    if name == "evaluate_model":
        from memorizing.evaluation.pretrained import evaluate_model

        return evaluate_model
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
