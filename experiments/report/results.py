"""What was measured: the JSON files of the queue's runs, and those beside them."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from memorizing.errors import ConfigError

FAMILIES = ("proofs", "code", "math", "books", "web")
"""In the order of all tables."""


@dataclass(frozen=True)
class Run:
    """One training run and its evaluations."""

    values: dict[str, Any]
    """As `experiments/queue` writes them."""

    @property
    def name(self) -> str:
        """Of its job."""
        return self.values["job"]

    @property
    def experiment(self) -> str:
        """What it belongs to."""
        return self.values["experiment"]

    @property
    def arm(self) -> str:
        """What it is compared as."""
        return self.values["arm"]

    @property
    def family(self) -> str:
        """Of texts."""
        return self.values["family"]

    @property
    def seed(self) -> int:
        """Of initialization and order of documents."""
        return self.values["seed"]

    @property
    def tokens(self) -> int:
        """Trained on."""
        return self.values["training"]["tokens"]

    @property
    def tokens_per_s(self) -> float | None:
        """Of training, median over the windows of its log; None in a file from before."""
        return self.values["training"].get("tokens_per_s")

    @property
    def trains(self) -> bool:
        """Otherwise it measures another run's model."""
        return self.values.get("trains", True)

    @property
    def learning_rate(self) -> float:
        """Of the matrices."""
        return self.values["config"]["training"]["learning_rate"]

    @property
    def precision(self) -> str:
        """Of products and activations; files from before hold only what was asked for."""
        return self.values.get("precision") or self.values["config"]["training"]["precision"]

    @property
    def num_weights(self) -> int:
        """Of the model, embedding included."""
        return self.values["num_weights"]

    @property
    def evaluations(self) -> dict[str, dict[str, Any]]:
        """By name, such as `8192` or `65536 shuffled`."""
        return self.values["evaluations"]

    @property
    def validation(self) -> list[dict[str, Any]]:
        """Nats of the validation documents against training tokens."""
        return self.values["training"]["validation"]


Seeds = dict[int, Run]
"""Runs that differ in nothing but their seed."""


@dataclass(frozen=True)
class Results:
    """Everything that the report is made of."""

    runs: tuple[Run, ...]
    others: dict[str, Any]
    """JSON files beside the runs, by name without suffix."""
    planned: dict[str, list[str]]
    """Settings of all jobs of the queue, by name."""

    def find(self, experiment: str, arm: str, family: str = "proofs") -> Seeds:
        """Runs of an arm by seed; none where it is not run yet."""
        wanted = (experiment, arm, family)
        found = (run for run in self.runs if (run.experiment, run.arm, run.family) == wanted)
        return {run.seed: run for run in sorted(found, key=lambda run: run.seed)}

    def list_arms(self, experiment: str, family: str = "proofs") -> list[str]:
        """Arms of an experiment that have a run, in the order of their files."""
        chosen = (r for r in self.runs if (r.experiment, r.family) == (experiment, family))
        return list(dict.fromkeys(run.arm for run in chosen))

    def is_outdated(self, run: Run) -> bool:
        """Whether the plan has other settings for it now."""
        return run.values["settings"] != self.planned.get(run.name, run.values["settings"])

    def keep_newest(self, experiment: str, arms: Iterable[str]) -> Results:
        """Of each family the present runs of an experiment once a seed has all arms; else outdated.

        Both are never compared: they differ in more than their arms.
        """
        chosen = [run for run in self.runs if run.experiment == experiment]
        new = [run for run in chosen if not self.is_outdated(run)]
        old = {run.family for run in chosen if self.is_outdated(run)}
        whole = {
            run.family
            for run in new
            if {r.arm for r in new if (r.family, r.seed) == (run.family, run.seed)} >= set(arms)
        }
        runs = (
            run
            for run in self.runs
            if run.experiment != experiment
            or run.family not in old
            or self.is_outdated(run) != (run.family in whole)
        )
        return replace(self, runs=tuple(runs))

    def list_missing(self) -> list[str]:
        """Planned jobs without a result."""
        done = {run.name for run in self.runs}
        return [name for name in self.planned if name not in done]


def load_results(runs_dir: Path, others_dir: Path) -> Results:
    """Read all results of the queue and the other JSON files; a folder may be missing.

    Raises:
        ConfigError: a file is no JSON, or not of a run.
    """
    runs = []
    for path in sorted(runs_dir.rglob("*.json")):
        values = _read_json(path)
        if not isinstance(values, dict) or not {"job", "training", "evaluations"} <= set(values):
            raise ConfigError(
                f"{str(path)!r} is no result of a run: it lacks job, training or evaluations; "
                "give the folder that experiments/queue writes, or remove the file"
            )
        runs.append(Run(values))
    names = [run.name for run in runs]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ConfigError(f"job {twice[0]!r} has two results in {str(runs_dir)!r}; remove one")
    others = {path.stem: _read_json(path) for path in sorted(others_dir.glob("*.json"))}
    return Results(tuple(runs), others, _read_plan())


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(
            f"{str(path)!r} is no JSON: {error}; remove it and run its job again"
        ) from error


def _read_plan() -> dict[str, list[str]]:
    queue = str(Path(__file__).resolve().parent.parent / "queue")
    sys.path.insert(0, queue)
    try:
        from plan import list_jobs  # type: ignore[import-not-found]
    finally:
        sys.path.remove(queue)
    return {job.name: list(job.settings) for job in list_jobs()}
