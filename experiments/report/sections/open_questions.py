"""Questions of the paper's last section: access by a threshold; what memory a task uses."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from formatting import format_difference, format_number, make_table
from results import FAMILIES, Results
from section import Section, name_machine, name_machines

_TITLE = "Open questions of the paper"
_ACCESS = (
    "**Access by a threshold of the score instead of a count.** Of its {most} nearest entries a "
    "query reads those whose score, the inner product of normalized query and key, reaches a "
    "threshold: one for all heads, or one for each, which validation documents reach as often as "
    "the count asks for. A model that was trained with a count of 32 reads test documents, at most "
    "{tokens:,} tokens of each, with {capacity:,} entries; it is not trained again. *Without* are "
    "queries whose memory is not empty and that read nothing of it. Change is against the count "
    "that was asked for."
)
_KINDS = (
    "**What kind of memory a task uses.** Test documents read with memory and with it closed. Of "
    "all nats that memory saves, how many does it save where the place that all heads together "
    "weigh most is so far away; for what class of token; and for tokens that were there so often "
    "before? Below zero memory costs."
)
_LOOKUPS = (
    "**Does it look at the definition?** (the paper's Table 8, counted). Of tokens of names that "
    "memory made at least twice as likely, while a definition of the name could be retrieved, the "
    "share whose heaviest place lies in it; beside it the newest exact match of the token before, "
    "and any entry by chance. Intervals draw documents, and names in each."
)
_STALE = (
    "**A memory read with the weights of n steps ago** (staleness) is in the section on search, "
    "with what approximate search costs."
)


def write(results: Results) -> Section | None:
    """What is measured of them; None where nothing is."""
    access, lookups = (results.others.get(name) for name in ("thresholds", "lookups"))
    if access is None and lookups is None:
        return None
    parts = []
    if access is not None:
        parts += _write_access(access)
    if lookups is not None:
        parts += _write_lookups(lookups)
    return Section(_TITLE, (*parts, _STALE))


def _write_access(values: Mapping[str, Any]) -> list[str]:
    rows = []
    for row in values["rows"]:
        change = row.get("against_count")
        rows.append(
            (
                row["access"],
                f"{row['count']}",
                format_number(row["read"], 1),
                f"{100 * row['read_nothing']:.1f}%",
                format_number(row["perplexity"]),
                "0" if change is None else format_difference(change),
            )
        )
    header = ("access", "asked for", "entries read", "without", "perplexity", "change (95%)")
    return [
        _ACCESS.format(**{key: values[key] for key in ("most", "tokens", "capacity")}),
        f"Repeat: `python experiments/queue --run main/{values['run']}`, "
        f"`python experiments/thresholds.py --tokens {values['tokens']}`. {name_machine(values)}",
        make_table(header, rows),
    ]


def _write_lookups(values: Mapping[str, Any]) -> list[str]:
    runs = sorted(values["runs"].values(), key=lambda run: FAMILIES.index(_find_family(run)))
    read = f"at most {values['max_tokens']:,} tokens of each" if values["max_tokens"] else "whole"
    names = " ".join(f"runs/experiments/{run['name']}" for run in runs)
    limit = f" --max-tokens {values['max_tokens']}" if values["max_tokens"] else ""
    counts = "; ".join(
        f"{_find_family(run)} {run['documents']} documents, {run['tokens']:,} tokens"
        for run in runs
    )
    parts = [
        _KINDS,
        f"Repeat: `python experiments/queue --run {' '.join(run['name'] for run in runs)}`, "
        f"`python experiments/lookups.py {names}{limit}`. Read {read}: {counts}. "
        f"{name_machines(run['machine'] for run in runs)}",
    ]
    for kind, label in (
        ("distances", "tokens back"),
        ("classes", "class of token"),
        ("earlier", "there before"),
    ):
        found = [{row["name"]: row for row in run[kind]} for run in runs]
        order = list(dict.fromkeys(name for run in found for name in run))
        rows = [
            (name, *(cell for run in found for cell in _format_shares(run.get(name))))
            for name in order
        ]
        columns = [
            f"{_find_family(run)}, {what}"
            for run in runs
            for what in ("of tokens", "of nats saved", "nats a token")
        ]
        parts.append(make_table((label, *columns), rows))
    rows = []
    for run in runs:
        for one in run["lookups"]:
            # Chance is below one percent.
            rates = [
                "{:.1f}% ({:.1f} to {:.1f})".format(
                    *(100 * rate[k] for k in ("rate", "low", "high"))
                )
                for rate in one["rates"]
            ]
            rows.append(
                (f"{_find_family(run)}, {one['what']}", f"{one['num_tokens']:,}",
                 f"{one['num_names']:,}", *rates)
            )  # fmt: skip
    header = (
        "", "tokens", "names", "memory's heaviest place", "newest exact match", "chance",
    )  # fmt: skip
    return [*parts, _LOOKUPS, make_table(header, rows)]


def _find_family(run: Mapping[str, Any]) -> str:
    return run["name"].rpartition("/")[2].partition("-")[0]


def _format_shares(row: Mapping[str, Any] | None) -> tuple[str, str, str]:
    if row is None:
        return ("", "", "")
    return (
        f"{100 * row['share_of_tokens']:.0f}%",
        f"{100 * row['share_of_saved']:.0f}%",
        f"{row['nats_saved_per_token']:.2f}",
    )
