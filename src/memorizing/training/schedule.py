"""The learning rate of step n, counted from 1."""

from __future__ import annotations

import math

from memorizing.config import TrainingConfig


def compute_schedule(config: TrainingConfig, step: int) -> float:
    """Share of its peak that every rate has at a step: warm-up, then the schedule's decay.

    With w = max(warmup_steps, 1), n = step, N = config.steps, f = final_share and p = (n - w) / (N
    - w) in [0, 1]:

        inverse_sqrt   min(n / w, 1) * sqrt(w / max(n, w))
        cosine         n / w up to w, then f + (1 - f) * (1 + cos(pi * p)) / 2
        linear         n / w up to w, then 1 - (1 - f) * p
        constant       min(n / w, 1)

    Args:
        config: the schedule and its lengths.
        step: the step about to be taken, counted from 1.
    """
    warmup = max(config.warmup_steps, 1)
    if step < warmup:
        return step / warmup
    if config.schedule == "inverse_sqrt":
        return math.sqrt(warmup / step)
    if config.schedule == "constant":
        return 1.0
    progress = min((step - warmup) / max(config.steps - warmup, 1), 1.0)
    share = (
        (1.0 + math.cos(math.pi * progress)) / 2 if config.schedule == "cosine" else 1.0 - progress
    )
    return config.final_share + (1.0 - config.final_share) * share


def compute_peak_rate(config: TrainingConfig, learning_rate: float) -> float:
    """The highest rate that a setting of the configuration stands for.

    `inverse_sqrt` is the paper's lr(n) = lr * min(n / w, 1) / sqrt(max(n, w)), whose peak is lr /
    sqrt(w), at n = w; the peak of the other schedules is the setting itself. Rates of gates and
    scales are peaks already.
    """
    if config.schedule == "inverse_sqrt":
        return learning_rate / math.sqrt(max(config.warmup_steps, 1))
    return learning_rate
