"""Approximate search, and entries written by older weights."""

from __future__ import annotations

import math
from typing import Any

from formatting import format_number, format_percent, make_table
from results import Results, Run
from section import Section, describe_sources, name_machine

_STALENESS = "python experiments/queue --run staleness/; python experiments/staleness.py"


def covers(run: Run) -> bool:
    """Whether this section shows a run: its checkpoints are read, not its evaluations."""
    return run.experiment == "staleness"


def write(results: Results) -> Section:
    """Two tables, from `approximate_search.json` and `staleness.json`."""
    runs, staleness = [r for r in results.runs if covers(r)], results.others.get("staleness")
    parts = [
        "### Approximate search",
        "One model with memory of section 1 reads the validation documents of proofs with each "
        "index; recall is of its own queries, by true scores. `exact` compares all keys as they "
        "are stored, in bf16: what it misses is as near as what it takes, but for rounding. "
        "Repeat: `python experiments/approximate_search.py`.",
        _write_search(results.others.get("approximate_search")),
        name_machine(results.others.get("approximate_search")),
        "### Stale entries",
        "While a model trains, the entries in its memory were written by older weights. Here "
        "documents are read by the weights of one step from a memory that the weights of an "
        "earlier step wrote, with normalized queries and keys and without.",
        describe_sources(runs, _STALENESS, reads=False)
        if runs or staleness is None
        else f"Repeat: `{_STALENESS}`.",
        _write_staleness(staleness, is_trained=bool(runs)),
        name_machine(staleness),
    ]
    return Section(
        "Searching approximately, and remembering what older weights wrote", tuple(parts)
    )


def _write_search(values: dict[str, Any] | None) -> str:
    if values is None:
        return "**Not run yet.**"
    rows = []
    for row in values["rows"]:
        if "recall" not in row:
            rows.append((row["index"], "", format_number(row["perplexity"]), "", ""))
            continue
        exact, off = row["against_exact"], row["against_no_memory"]
        rows.append(
            (
                f"`{row['index']}`",
                format_number(row["recall"], 3),
                format_number(row["perplexity"]),
                format_percent(exact["perplexity_change"], 2),
                format_percent(off["perplexity_change"]),
            )
        )
    header = ("index", "recall", "perplexity", "against exact", "against no memory")
    about = (
        f"`{values['run']}`, {values['capacity']:,} entries, the first "
        f"{values['tokens_per_document']:,} tokens of each document:"
    )
    return f"{about}\n\n{make_table(header, rows)}"


def _write_staleness(values: dict[str, Any] | None, is_trained: bool) -> str:
    if values is None:
        return "The models are trained, but **not read yet**." if is_trained else ""
    rows = []
    for name, found in values["models"].items():
        fresh = {p["read_at"]: p for p in found["pairs"] if p["steps_old"] == 0}
        for pair in found["pairs"]:
            change = pair["nats_per_token"] - fresh[pair["read_at"]]["nats_per_token"]
            rows.append(
                (
                    name,
                    f"{pair['read_at']:,}",
                    f"{pair['steps_old']:,}",
                    format_number(pair["perplexity"]),
                    format_percent(math.expm1(change)) if pair["steps_old"] else "",
                    format_number(pair["key_cosine"], 3),
                    format_number(pair["key_norm_ratio"]),
                )
            )
    header = (
        "keys", "read at step", "steps old", "perplexity", "change", "cosine of keys",
        "norm, old to new",
    )  # fmt: skip
    return make_table(header, rows)
