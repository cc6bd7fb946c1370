"""Tasks that are generated: whatever `experiments/synthetic.py` and its like have written."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from formatting import make_table
from results import Results
from section import Section, name_machines

_ABOUT = {
    "pairs": "Associative retrieval: pairs of key and value, then keys are asked for.",
    "rewrite": "Keys are written several times, and the last value counts: order matters.",
    "passkey": "A number hidden in varied filler text, asked for at the end.",
    "needles": "Many keys of the same form, of which some are asked for.",
    "tracking": "Chains of variables: `X2 = X1`.",
    "recall": "Multi-query associative recall (MQAR): pairs of tokens, a vocabulary of 8,192.",
    "strings": "Pairs of long identifiers, one asked for.",
    "distraction": "The memory also holds other documents; own share is of the attention.",
}
"""What a task asks, by name."""


def write(results: Results) -> Section:
    """A table for each task."""
    tasks = {stem: _split_tasks(values) for stem, values in results.others.items()}
    look_ups = {stem: values for stem, values in results.others.items() if _is_look_up(values)}
    choices = {stem: values for stem, values in results.others.items() if _is_choice(values)}
    title = "Synthetic tasks"
    commands = (
        "`python experiments/dictionary_lookup.py` and `python experiments/synthetic.py --task all`"
    )
    parts = [
        "Generated from a seed, nothing downloaded; controls and the arm without memory beside. "
        f"Answers are exact: all of their tokens are the likeliest. Repeat: {commands} (each "
        "says by `--help` how to choose tasks and seeds).",
    ]
    if not any(tasks.values()) and not look_ups and not choices:
        return Section(title, (*parts, "**Not run yet.**"))
    for stem, values in look_ups.items():
        parts += [
            f"### Dictionary look-up (`{stem}.json`)",
            _write_look_up(values),
            _name_machines([values]),
        ]
    for stem, values in choices.items():
        parts += [
            f"### Dictionary look-up: what was chosen from (`{stem}.json`)",
            _write_choice(values),
            _name_machines(list(values.values())),
        ]
    for stem, found in tasks.items():
        for task in found:
            name = task["task"]
            parts += [
                f"### {name.capitalize()} (`{stem}.json`)",
                _ABOUT.get(name, ""),
                _write_task(task),
            ]
        parts.append(_name_machines(found))
    return Section(title, tuple(parts))


def _split_tasks(values: Any) -> list[dict[str, Any]]:
    """One task's result, or several by name, as `experiments/synthetic.py` writes them."""
    if not isinstance(values, dict):
        return []
    if {"task", "seeds"} <= set(values):
        return [values]
    parts = list(values.values())
    are_tasks = parts and all(isinstance(p, dict) and {"task", "seeds"} <= set(p) for p in parts)
    return parts if are_tasks else []


def _is_look_up(values: Any) -> bool:
    return isinstance(values, dict) and {"chance", "scores"} <= set(values)


def _is_choice(values: Any) -> bool:
    """Several recipes of the look-up by name, as its script writes them."""
    return isinstance(values, dict) and bool(values) and all(map(_is_look_up, values.values()))


def _name_machines(parts: Sequence[Mapping[str, Any]]) -> str:
    return name_machines(machine for part in parts for machine in part.get("machines", ()))


def _write_task(task: Mapping[str, Any]) -> str:
    from memorizing.evaluation.answers import compute_wilson_interval

    seeds: Mapping[str, Mapping[str, Any]] = task["seeds"]
    rows = []
    has_shares = False
    for name in dict.fromkeys(name for scores in seeds.values() for name in scores):
        scores = [found[name] for found in seeds.values() if name in found]
        right, asked = (sum(score[key] for score in scores) for key in ("right", "asked"))
        low, high = compute_wilson_interval(right, asked)
        shares = [s["own_share"] for s in scores if s.get("own_share") is not None]
        has_shares = has_shares or bool(shares)
        arm, _, cell = name.partition("/")
        by_seed = [
            f"{found[name]['exact']:.1%}" if name in found else "" for found in seeds.values()
        ]
        total = f"{right / asked:.1%} ({100 * low:.1f} to {100 * high:.1f})"
        share = f"{sum(shares) / len(shares):.2f}" if shares else ""
        rows.append((arm, cell, total, *by_seed, share))
    header = (
        "arm",
        "what is read",
        "right (95%)",
        *(f"seed {seed}" for seed in seeds),
        "own share",
    )
    width = len(header) if has_shares else len(header) - 1
    return make_table(header[:width], [row[:width] for row in rows], num_text=2)


def _write_look_up(values: Mapping[str, Any]) -> str:
    seeds: Mapping[str, Mapping[str, Any]] = values["scores"]
    names = dict.fromkeys(name for scores in seeds.values() for name in scores)
    arms = list(dict.fromkeys(name.partition("/")[0] for name in names))
    lengths = sorted({int(name.partition("/")[2]) for name in names})
    rows = []
    for length in lengths:
        cells = [
            _join(
                [found[f"{arm}/{length}"] for found in seeds.values() if f"{arm}/{length}" in found]
            )
            for arm in arms
        ]
        rows.append((f"{length:,}", *cells))
    weights = f"{values['weights']:,} weights. " if "weights" in values else ""
    about = (
        f"{weights}First questions of a key: value tokens right, mean of {len(seeds)} seeds (least "
        f"to most); chance is {values['chance']:.1%}."
    )
    if any(_read_factor(arm) != 1 for arm in arms):
        about += " x is what the memory's learned scale is multiplied by when it is read."
    header = ("tokens read", *(arm.replace("_", " ") for arm in arms))
    return f"{about}\n\n{make_table(header, rows, num_text=0)}"


def _write_choice(recipes: Mapping[str, Mapping[str, Any]]) -> str:
    """A row for each length and recipe, a column for each factor of the memory's scale."""
    names = dict.fromkeys(
        name
        for values in recipes.values()
        for scores in values["scores"].values()
        for name in scores
    )
    arms, lengths = zip(*(name.split("/") for name in names), strict=True)
    factors = [arm for arm in dict.fromkeys(arms) if arm.startswith("memory")]
    rows = []
    for length in sorted(set(map(int, lengths))):
        for recipe, values in recipes.items():
            scores = values["scores"].values()
            cells = [
                _join([found[name] for found in scores if (name := f"{arm}/{length}") in found])
                for arm in factors
            ]
            rows.append((f"{length:,}", f"`{recipe}`", f"{values['weights']:,}", *cells))
    seeds = sorted({seed for values in recipes.values() for seed in values["scores"]}, key=int)
    about = (
        "First questions of a key: value tokens right, by what the memory's learned scale is "
        f"multiplied by when it is read; {'seeds' if len(seeds) > 1 else 'seed'} "
        f"{', '.join(seeds)}, whose documents no other table shows."
    )
    header = ("tokens read", "recipe", "weights", *(f"x{_read_factor(arm):g}" for arm in factors))
    return f"{about}\n\n{make_table(header, rows, num_text=2)}"


def _read_factor(arm: str) -> float:
    """Of `memory_x3`, 3; of other arms 1."""
    return float(arm.partition("_x")[2] or 1)


def _join(scores: Sequence[Mapping[str, Any]]) -> str:
    if not scores:
        return ""
    right = [score["first"] for score in scores]
    mean = f"{sum(right) / len(right):.1%}"
    if len(right) < 2:
        return mean
    return f"{mean} ({100 * min(right):.1f} to {100 * max(right):.1f})"
