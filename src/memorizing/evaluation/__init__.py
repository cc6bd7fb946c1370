"""Perplexity over whole documents: with a memory of any capacity, without, and with a wrong one."""

from memorizing.evaluation.capacities import check_capacities, evaluate_capacities
from memorizing.evaluation.reading import Progress, evaluate_documents
from memorizing.evaluation.results import (
    Control,
    DocumentResult,
    EvaluationResult,
    compare_results,
)

__all__ = [
    "Control",
    "DocumentResult",
    "EvaluationResult",
    "Progress",
    "check_capacities",
    "compare_results",
    "evaluate_capacities",
    "evaluate_documents",
]
