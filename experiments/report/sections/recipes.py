"""Our recipe against the paper's, with memory, at equal training time."""

from __future__ import annotations

from collections.abc import Iterable

from comparing import Change, check_same_documents, compare, measure
from formatting import (
    MISSING,
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
        "The same model with memory, trained for as long by our first recipe (queries and keys "
        "mixed over four tokens, induction start, Muon) and by the paper's (neither of them, "
        "Adafactor with its schedule, warm-up scaled). Times are those of `step_times.json`, of a "
        "CPU: the paper's steps are shorter there, so that it takes more of them. Learning rates "
        "were tried on the validation documents of proofs, below.",
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
            f"At least 2% below the paper's recipe, interval and all, at {int(_CAPACITIES[0]):,} "
            f"entries: {join_words(reached)}."
        )
    parts += _write_rates(results)
    return Section("Our recipe against the paper's", tuple(parts))


def _is_below(change: Change | None) -> bool:
    return change is not None and change.interval is not None and change.interval[1] <= _AIM


def _write_rates(results: Results) -> list[str]:
    arms = {arm: results.find("rates", arm) for arm in sorted(results.list_arms("rates"))}
    check_same_documents(*((runs, "8192 validation") for runs in arms.values()))
    perplexities = {arm: measure(runs, "8192 validation") for arm, runs in arms.items()}
    if not arms:
        return []
    sentences = []
    for recipe, name in (("ours", "Our recipe"), ("paper", "The paper's recipe")):
        tried = {
            perplexity: _list_rates(arms[arm].values())
            for arm, perplexity in perplexities.items()
            if arm.startswith(f"{recipe}-") and perplexity is not None
        }
        used = _list_rates(r for r in results.runs if (r.experiment, r.arm) == ("recipes", recipe))
        best = join_words(tried[min(tried)] if tried else [], "not tried yet")
        sentences.append(
            f"{name}: rate used above {join_words(used, MISSING)}, best of those tried {best}."
        )
    tokens = sorted({format_tokens(run.tokens) for runs in arms.values() for run in runs.values()})
    rows = [(f"`{arm}`", format_number(found)) for arm, found in perplexities.items()]
    return [
        f"Learning rates, {join_words(tokens)} tokens, proofs, perplexity of the validation "
        "documents:",
        make_table(("recipe and rate", "perplexity"), rows),
        " ".join(sentences),
    ]


def _list_rates(runs: Iterable[Run]) -> list[str]:
    return [f"{rate:g}" for rate in sorted({run.learning_rate for run in runs})]
