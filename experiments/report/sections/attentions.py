"""The attentions that the paper names as related work, in the place of the model's own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from comparing import (
    Bucket,
    Change,
    check_same_documents,
    compare,
    compare_positions,
    find_shared_seeds,
    measure,
)
from formatting import (
    MISSING,
    format_change,
    format_number,
    format_percent,
    format_seeds,
    format_tokens,
    join_words,
    make_table,
)
from results import FAMILIES, Results, Run, Seeds
from section import Section, describe_sources, name_machine

from sections.capacities import name_bucket
from sections.window import read_times

_TITLE = "Other attentions instead"
_ARMS = {
    "cache": "Transformer-XL: window and cache of 512",
    "window": "Longformer's sliding window, 2,048",
    "linformer": "Linformer: 512 and slots for 4,096 before",
    "performer": "Performer: all by random features",
    "performer-beyond": "Performer beyond a window of 512",
    "compressive": "Compressive Transformer: 512 and 2,048 slots",
    "memory": "memory of 8,192 in one layer",
}
_TOKENS = "-tokens"
"""Ends the name of an arm that trains on as many tokens as the others, instead of as long."""
_ABOUT = (
    "Each replaces local attention, or adds to it, in all four layers; parameters, short "
    "convolutions, training and vocabulary are those of the cache alone. *Linformer* has no causal "
    "version of its own: here keys and values of blocks of 128 tokens that are complete, and "
    "before the window, are projected onto 16 slots. *Performer* is FAVOR+ with 128 orthogonal "
    "features, its sums carried over the whole document: in one version for all tokens, in the "
    "other for those before an exact window. The *Compressive Transformer* keeps a slot for four "
    "tokens, taught by attention reconstruction; its slots take the bytes of the memory's entries "
    "and reach as far. `experiments/attentions` has them, and how they deviate from their papers."
)
_NOTES = (
    "*Change* is against the cache alone, *memory* compares memory with the arm; by position, "
    "change against the cache alone. *Time of a token* in training, against the cache alone, and "
    "*state*, what is kept of a document to read on, are of `step_times_attentions.json`."
)


def covers(run: Run) -> bool:
    """Whether this section shows a run."""
    return run.experiment == "attentions" and run.arm.removesuffix(_TOKENS) in _ARMS


def write(results: Results) -> Section:
    """Two tables a family: arms that train as long as one another, and on as many tokens."""
    runs = [run for run in results.runs if covers(run)]
    parts = [_ABOUT, describe_sources(runs, "python experiments/queue --run attentions/")]
    if not runs:
        return Section(_TITLE, tuple(parts))
    times = read_times(results, "step_times_attentions")
    parts.append(_NOTES if times else f"{_NOTES} It is not there yet.")
    ahead, num = [], 0
    for family in FAMILIES:
        for suffix, what in (("", "in as much time"), (_TOKENS, "on as many tokens")):
            arms = _find_arms(results, family, suffix)
            if not any(arms.values()):
                continue
            parts += [
                f"### {family.capitalize()}, trained {what}",
                _make_table(arms, times),
            ]
            if not suffix:
                found = {name: _compare_memory(arms, name) for name in arms if name != "memory"}
                known = {name: change for name, change in found.items() if change is not None}
                num += len(known)
                ahead += [f"{n} ({family})" for n, c in known.items() if c.difference.high < 0]
    if num:
        parts.append(
            f"Of {num} comparisons at equal time, memory is ahead, with an interval below zero, of "
            f"{join_words(ahead)}."
        )
    parts.append(name_machine(results.others.get("step_times_attentions")))
    return Section(_TITLE, tuple(parts))


def _find_arms(results: Results, family: str, suffix: str) -> dict[str, Seeds]:
    """Runs of a table by the name of the arm: memory is the same in both; empty without others."""
    names = {arm: arm if arm == "memory" else f"{arm}{suffix}" for arm in _ARMS}
    found = {arm: results.find("attentions", name, family) for arm, name in names.items()}
    if suffix and not any(seeds for arm, seeds in found.items() if arm != "memory"):
        return {}
    check_same_documents(*((seeds, _read_with(arm)) for arm, seeds in found.items()))
    return found


def _read_with(arm: str) -> str:
    """The evaluation of an arm."""
    return "8192" if arm == "memory" else "0"


def _compare_memory(arms: Mapping[str, Seeds], name: str) -> Change | None:
    return compare(arms["memory"], _read_with("memory"), arms[name], _read_with(name))


def _make_table(arms: Mapping[str, Seeds], times: Mapping[str, Mapping[str, Any]]) -> str:
    cache = arms["cache"]
    positions = {
        name: compare_positions(seeds, _read_with(name), cache, "0") for name, seeds in arms.items()
    }
    buckets = sorted({b for found in positions.values() for b in found}, key=lambda b: b[0])
    shared = find_shared_seeds(*((seeds, _read_with(name)) for name, seeds in arms.items()))
    rows = []
    for name, label in _ARMS.items():
        seeds, timed = arms[name], times.get(name)
        change = None if name == "cache" else compare(seeds, _read_with(name), cache, "0")
        memory = "" if name == "memory" else format_change(_compare_memory(arms, name))
        rows.append(
            (
                label,
                format_tokens(next(iter(seeds.values())).tokens) if seeds else "",
                format_number(measure(seeds, _read_with(name), seeds=shared)),
                "0" if name == "cache" and cache else format_change(change),
                format_seeds(change),
                memory,
                *(_format_position(positions[name], bucket) for bucket in buckets),
                "" if timed is None else f"{timed['ratio']:.2f}",
                "" if timed is None else f"{timed['state_bytes'] / 2**20:.1f} MiB",
                f"{next(iter(seeds.values())).num_weights / 1e6:.2f}M" if seeds else "",
            )
        )
    header = (
        "attention", "tokens", "perplexity", "change (95%)", "by seed", "memory (95%)",
        *(name_bucket(bucket) for bucket in buckets), "time of a token", "state", "weights",
    )  # fmt: skip
    return make_table(header, rows)


def _format_position(found: Mapping[Bucket, float], bucket: Bucket) -> str:
    if not found:
        return MISSING
    return format_percent(found[bucket]) if bucket in found else ""
