"""All jobs of the experiments, in the order in which they are worth their time.

Three tiers: the main claim on five families; the paper's Table 4 on proofs; everything else. The
recipes in `experiments/recipes` hold our best model; an arm changes a few of their settings.
"""

from __future__ import annotations

from jobs import FAMILIES, Evaluation, Job

LARGE = 65_536
NO_MEMORY = ("model.capacity=0",)
PAPER = (
    "model.conv_len=0",
    "model.induction_init=false",
    "training.optimizer=adafactor",
    "training.learning_rate=1.0",
    "training.embedding_learning_rate=0",
    "training.vector_learning_rate=0",
    "training.gate_learning_rate=0.01",
    "training.schedule=inverse_sqrt",
    "training.warmup_steps=100",
)
"""What the paper has and our recipe has not; its warm-up of 1000 steps is scaled to a short run."""


def read_off() -> tuple[Evaluation, ...]:
    """How a model without memory is measured."""
    return (Evaluation(0),)


def read_on(*capacities: int) -> tuple[Evaluation, ...]:
    """How a model with memory is measured where only its size matters."""
    return tuple(Evaluation(capacity) for capacity in capacities)


CONTROLS = (
    Evaluation(LARGE, "other_document"),
    Evaluation(LARGE, "shuffled"),
    Evaluation(0, "off"),
)


def list_jobs() -> list[Job]:
    """Every job, first things first."""
    return [*_plan_main(), *_plan_table_4(), *_plan_rest()]


def find_jobs(patterns: list[str]) -> list[Job]:
    """Jobs whose name holds one of the words; all where none is given."""
    return [job for job in list_jobs() if not patterns or any(p in job.name for p in patterns)]


def _plan_main() -> list[Job]:
    """Memory against cache only on the five families: three seeds of two, one of the others."""
    jobs = []
    seeds = {0: FAMILIES, 1: ("proofs", "code"), 2: ("proofs", "code")}
    for seed, families in seeds.items():
        for family in families:
            capacities = (512, 2048, 8192, LARGE) if seed == 0 else (8192, LARGE)
            on = (*read_on(*capacities), *(CONTROLS if seed == 0 else CONTROLS[:1]))
            jobs.append(Job("main", "memory", family, (), on, 1, seed))
            jobs.append(Job("main", "cache", family, NO_MEMORY, read_off(), 1, seed))
    return jobs


def _plan_table_4() -> list[Job]:
    return []


def _plan_rest() -> list[Job]:
    return []
