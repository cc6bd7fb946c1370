"""What the experiments consist of: jobs, each a training run and what is measured of it."""

from __future__ import annotations

from dataclasses import dataclass

FAMILIES = ("proofs", "code", "math", "books", "web")


@dataclass(frozen=True)
class Evaluation:
    """One reading of the held-out documents."""

    capacity: int
    control: str | None = None
    index: str = "exact"
    use: str = "test"
    """Documents read: those held out for claims (`test`) or for choices (`validation`)."""
    documents: tuple[str, ...] = ()
    """Only these; empty is all."""
    max_tokens: int = 0
    """Tokens read of each; 0 is what the recipe says."""

    @property
    def name(self) -> str:
        """As it stands in the result."""
        parts = [str(self.capacity), self.control or "", self.index, self.use]
        defaults = ["", "", "exact", "test"]
        shown = [p for p, d in zip(parts, defaults, strict=True) if p and p != d]
        return " ".join(shown)


@dataclass(frozen=True)
class Job:
    """One training run: a recipe of a family with some settings changed, by one seed."""

    experiment: str
    """What it belongs to; a folder of results."""
    arm: str
    """What it is compared as."""
    family: str
    settings: tuple[str, ...]
    """`table.key=value`, applied to the family's recipe in this order; those of the table
    `attention` choose one of `experiments/attentions`."""
    evaluations: tuple[Evaluation, ...]
    tier: int
    seed: int = 0
    start_from: str = ""
    """Name of the job whose weights it begins with."""
    trains: bool = True
    """Otherwise the model of `start_from` is measured as it is."""

    @property
    def name(self) -> str:
        """Unique; the result's path."""
        return f"{self.experiment}/{self.family}-{self.arm}-seed{self.seed}"
