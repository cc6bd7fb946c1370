"""Whatever else was run: crossbatch training, and experiments that have no part of their own."""

from __future__ import annotations

from collections.abc import Sequence

from comparing import Change, compare, have_same_documents, measure
from formatting import (
    format_change,
    format_number,
    format_seeds,
    format_tokens,
    make_table,
)
from results import Results, Run, Seeds
from section import Section, describe_sources

_ABOUT = {
    "crossbatch": (
        "Crossbatch training (Focused Transformer): the memory layer also sees keys and values of "
        "earlier segments with gradient, and those of other rows as negatives; the last tenth of "
        "the steps has the paper's objective. It reads 4 documents side by side instead of 8: two "
        "segments of each a step, which are as many tokens as without, and in the last tenth one, "
        "half as many. It has as many steps as take as much time on the CPU of `step_times.json`."
    ),
    "long": (
        "A model with memory of section 6, not trained further, reads two long test documents with "
        "larger and larger memories; each reading is compared with its own with 65,536 entries. "
        "Intervals of two documents say little about others."
    ),
}
"""What an experiment is, by name."""
_BASES = ("ours", "memory", "baseline", "cache")
"""Arms of an experiment that its others are compared with; the first that is there."""
_ELSEWHERE = (("table4", "ours-512-8192-xl"), ("ablations", "ours"), ("main", "memory"))
"""What an experiment without such an arm is compared with."""
_OWN_BASES = {"long": "65536"}
"""The evaluation that the others of the same run are compared with, by experiment."""
_NOTHING = "nothing alike is run"
_NEAR = 0.02
"""Training tokens that differ by less are equal."""
_AT_EQUAL_TIME = ("crossbatch",)
"""Experiments whose arms train for as long as one another, and so on other numbers of tokens."""


def write(results: Results, runs: Sequence[Run]) -> Section:
    """A table for each experiment.

    Args:
        results: everything, to find what to compare with.
        runs: those that no other section shows.
    """
    names = list(dict.fromkeys([*_ABOUT, *(run.experiment for run in runs)]))
    parts = []
    for name in names:
        chosen = [run for run in runs if run.experiment == name]
        parts += [
            f"### `{name}`",
            _ABOUT.get(name, ""),
            describe_sources(chosen, f"python experiments/queue --run {name}/"),
        ]
        if chosen:
            parts.append(_make_table(results, chosen))
    return Section("Beyond the paper, and other experiments", tuple(parts))


def _make_table(results: Results, runs: Sequence[Run]) -> str:
    rows = []
    for family, arm in dict.fromkeys((run.family, run.arm) for run in runs):
        found = {run.seed: run for run in runs if (run.family, run.arm) == (family, arm)}
        first = next(iter(found.values()))
        for name in dict.fromkeys(n for run in found.values() for n in run.evaluations):
            base_name, change = _compare(results, found, name)
            rows.append(
                (
                    family,
                    f"`{arm}`",
                    name,
                    base_name or _NOTHING,
                    format_number(measure(found, name)),
                    "" if change is None else format_change(change),
                    format_seeds(change),
                    format_tokens(first.tokens),
                )
            )
    header = (
        "family", "arm", "read with", "compared with", "perplexity", "change (95%)", "by seed",
        "training tokens",
    )  # fmt: skip
    shown = [i for i, name in enumerate(header) if name != "by seed" or any(row[i] for row in rows)]
    return make_table(
        [header[i] for i in shown], [[row[i] for i in shown] for row in rows], num_text=4
    )


def _compare(results: Results, arm: Seeds, name: str) -> tuple[str, Change | None]:
    """What an evaluation of an arm is compared with, in words, and the change."""
    run = next(iter(arm.values()))
    own = _OWN_BASES.get(run.experiment)
    if own is not None:
        return ("-", None) if name == own else (f"its own {own}", compare(arm, name, arm, own))
    base_name, base = find_base(results, run, name)
    change = None if base is None else compare(arm, name, base, _read_like(base, name))
    return base_name, change


def find_base(results: Results, run: Run, name: str) -> tuple[str, Seeds | None]:
    """What an evaluation of a run is compared with: the same read, as many tokens trained on.

    Returns:
        Its name and runs; None where there is nothing, and a dash where it is itself the base.
    """
    places = [(run.experiment, arm) for arm in _BASES]
    if (run.experiment, run.arm) in places:
        return "-", None
    for experiment, arm in (*places, *_ELSEWHERE):
        base = results.find(experiment, arm, run.family)
        like = _read_like(base, name)
        if run.seed not in base or like not in base[run.seed].evaluations:
            continue
        other = base[run.seed]
        is_same = have_same_documents(run.evaluations[name], other.evaluations[like])
        is_near = abs(other.tokens / run.tokens - 1) < _NEAR
        is_timed = experiment == run.experiment and experiment in _AT_EQUAL_TIME
        if is_same and (is_near or is_timed):
            return f"`{experiment}/{arm}`", base
    return "", None


def _read_like(base: Seeds, name: str) -> str:
    """The evaluation of the same name, or, of a model without memory, the one without."""
    capacity, _, rest = name.partition(" ")
    without = f"0 {rest}".strip()
    has_name = any(name in run.evaluations for run in base.values())
    return name if has_name or not capacity.isdigit() else without
