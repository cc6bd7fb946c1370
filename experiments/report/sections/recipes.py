"""Our recipe against the paper's, with memory, at equal training time."""

from __future__ import annotations

from comparing import Change, compare, measure
from formatting import (
    format_change,
    format_number,
    format_seeds,
    format_tokens,
    join_words,
    make_table,
)
from results import FAMILIES, Results, Run
from section import Section, describe_sources

_CAPACITIES = ("8192", "65536")
_AIM = -0.02


def covers(run: Run) -> bool:
    """Whether this section shows a run."""
    return run.experiment in ("recipes", "rates")


def write(results: Results) -> Section:
    """A line a family and memory, and the rates tried."""
    runs = [run for run in results.runs if run.experiment == "recipes"]
    parts = [
        "The same model with memory, trained for as long by our recipe (queries and keys mixed "
        "over four tokens, induction start, Muon) and by the paper's (neither of them, Adafactor "
        "with its schedule, warm-up scaled). The paper's steps are shorter, so that it takes "
        "more of them (`step_times.json`). The learning rate of each is the best of three on the "
        "validation documents of proofs, below.",
        describe_sources(runs, "python experiments/queue --run recipes/"),
    ]
    reached: list[str] = []
    rows = []
    for family in FAMILIES:
        ours, paper = (results.find("recipes", arm, family) for arm in ("ours", "paper"))
        for capacity in _CAPACITIES if ours and paper else ():
            change = compare(ours, capacity, paper, capacity)
            if capacity == _CAPACITIES[0] and _is_below(change):
                reached.append(family)
            tokens = (next(iter(arm.values())).tokens for arm in (paper, ours))
            rows.append(
                (
                    family,
                    f"{int(capacity):,}",
                    format_number(measure(paper, capacity)),
                    format_number(measure(ours, capacity)),
                    format_change(change),
                    format_seeds(change),
                    " / ".join(format_tokens(count) for count in tokens),
                )
            )
    if rows:
        header = ("family", "read with", "the paper's", "ours", "change (95%)", "by seed", "tokens")
        parts.append(make_table(header, rows))
        parts.append(
            f"At least 2% below the paper's recipe, interval and all, at {_CAPACITIES[0]} entries: "
            f"{join_words(reached)}."
        )
    parts += _write_rates(results)
    return Section("Our recipe against the paper's", tuple(parts))


def _is_below(change: Change | None) -> bool:
    return change is not None and change.interval is not None and change.interval[1] <= _AIM


def _write_rates(results: Results) -> list[str]:
    rows = [
        (f"`{arm}`", format_number(measure(results.find("rates", arm), "8192 validation")))
        for arm in sorted(results.list_arms("rates"))
    ]
    if not rows:
        return []
    return [
        "Learning rates, 1.0M tokens, proofs, perplexity of the validation documents:",
        make_table(("recipe and rate", "perplexity"), rows),
    ]
