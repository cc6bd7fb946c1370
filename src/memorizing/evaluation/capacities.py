"""One model with several memories, and with wrong ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from memorizing.config import Control
from memorizing.errors import ConfigError
from memorizing.evaluation.reading import (
    Progress,
    check_evaluation,
    count_reachable,
    evaluate_documents,
)
from memorizing.evaluation.results import EvaluationResult
from memorizing.model import MemorizingTransformer

if TYPE_CHECKING:
    from memorizing.data import TokenizedDocument


def evaluate_capacities(
    model: MemorizingTransformer,
    documents: Sequence[TokenizedDocument],
    start_token: int,
    *,
    capacities: Sequence[int],
    controls: Sequence[Control] = (),
    rows: int = 8,
    max_tokens: int = 0,
    seed: int = 0,
    progress: Progress | None = None,
) -> dict[str, EvaluationResult]:
    """Evaluate one model with several memories, and with controls at the largest.

    What must come out the same is read once: capacities that all hold the longest document, and
    `off` beside capacity 0.

    Returns:
        Results by name: the capacities as text, rising, then the controls.

    Raises:
        ConfigError: as `evaluate_documents`; nothing to evaluate.
    """
    plan = check_capacities(model, documents, capacities, controls, rows)
    longest = max(len(document.tokens) for document in documents)
    reachable = count_reachable(min(longest, max_tokens or longest), model)
    # Runs with equal settings give equal results.
    settings: dict[str, tuple[int, Control | None]] = {
        name: (min(capacity, reachable), None if control == "off" else control)
        for name, (capacity, control) in plan.items()
    }
    num_runs = len(set(settings.values()))
    done: dict[tuple[int, Control | None], EvaluationResult] = {}
    for capacity, control in settings.values():
        if (capacity, control) not in done:
            done[capacity, control] = evaluate_documents(
                model,
                documents,
                start_token,
                capacity=capacity,
                control=control,
                rows=rows,
                max_tokens=max_tokens,
                seed=seed,
                progress=None if progress is None else _shift(progress, len(done), num_runs),
            )
    return {
        name: replace(done[settings[name]], capacity=capacity, control=control)
        for name, (capacity, control) in plan.items()
    }


def check_capacities(
    model: MemorizingTransformer,
    documents: Sequence[TokenizedDocument],
    capacities: Sequence[int],
    controls: Sequence[Control],
    rows: int,
) -> dict[str, tuple[int, Control | None]]:
    """Refuse what `evaluate_capacities` cannot evaluate; else capacity and control by name.

    Raises:
        ConfigError: see `evaluate_capacities`.
    """
    if not capacities:
        raise ConfigError("there is no capacity to evaluate; give one or more, such as 0,512,8192")
    plan: dict[str, tuple[int, Control | None]] = {str(c): (c, None) for c in sorted(capacities)}
    for control in controls:
        plan[control] = (0 if control == "off" else max(capacities), control)
    for capacity, control in plan.values():
        check_evaluation(model, documents, capacity, rows, control)
    return plan


def _shift(progress: Progress, num_done: int, num_runs: int) -> Progress:
    """Progress of one run as that of all."""
    return lambda done, total: progress(num_done * total + done, num_runs * total)
