"""How to repeat everything, on what it was run, and what was not."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from formatting import format_tokens, make_table
from results import Results, Run
from section import Section, shorten_commit

_COMMANDS = """\
```sh
python experiments/corpora/build.py --stacks FOLDER  # fetches packages, builds the five families
python experiments/queue --run     # trains and evaluates what is not done; goes on after Ctrl-C
python experiments/queue --status  # what is done
python experiments/report          # this page
```"""
_PACKAGES = (
    "python",
    "torch",
    "transformers",
    "tokenizers",
    "numpy",
    "faiss-cpu",
    "scann",
    "usearch",
)


def write(results: Results) -> Section:
    """Commands, machines, hours, what is missing, and every run."""
    missing = results.list_missing()
    parts = [
        "The parts of the queue can be run alone (`--run table4 proofs`: jobs whose name holds "
        "one of the words). A run continues where it was interrupted, and its result is one "
        "JSON file.",
        _COMMANDS,
        "`--stacks` is a checkout of the Stacks project, two thirds of math; it is in no package "
        "registry (`experiments/corpora/README.md` says which commit, and what is without it).",
    ]
    if results.runs:
        machines = f"Machine: {'; '.join(_list_machines(results.runs))}."
        parts.append(f"{machines} {_describe_hours(results.runs)}".strip())
    if missing:
        names = "\n".join(f"- `{name}`" for name in missing)
        parts.append(
            _fold(f"{len(missing)} of {len(results.planned)} planned runs are not run", names)
        )
    else:
        parts.append(f"All {len(results.planned)} planned runs are done.")
    if results.runs:
        parts.append(_fold("Every run", _make_table(results.runs)))
    return Section("How to repeat it", tuple(parts))


def _describe_hours(runs: Sequence[Run]) -> str:
    speeds = [(run.tokens, run.tokens_per_s) for run in runs if run.trains]
    timed = [tokens / speed for tokens, speed in speeds if speed]
    if not timed:
        return ""
    return (
        f"Training took {sum(timed) / 3600:.1f} hours of one worker: a run's tokens over its "
        f"median tokens per second, summed over {len(timed)} of {len(speeds)} trainings; "
        "several went on at once, and evaluation is not counted."
    )


def _fold(title: str, content: str) -> str:
    """What is shown on a click."""
    return f"<details>\n<summary>{title}</summary>\n\n{content}\n\n</details>"


def _list_machines(runs: Sequence[Run]) -> list[str]:
    return list(dict.fromkeys(_describe_machine(run.values["machine"]) for run in runs))


def _describe_machine(machine: dict[str, Any]) -> str:
    versions = machine["versions"]
    named = ", ".join(f"{name} {versions[name]}" for name in _PACKAGES if name in versions)
    threads = "1 thread" if machine["threads"] == 1 else f"{machine['threads']} threads"
    device = machine.get("device", "cpu")
    gpu = "" if device == "cpu" else f"{device}, "
    return f"{gpu}{machine['processor']}, {machine['cores']} cores, {threads} a run; {named}"


def _make_table(runs: Sequence[Run]) -> str:
    rows = []
    for run in runs:
        commits = sorted({shorten_commit(commit) for commit in run.values["commits"]})
        speed = f"{run.tokens_per_s:,.0f}" if run.trains and run.tokens_per_s else ""
        weights = f"{run.num_weights / 1e6:.2f}M"
        tokens = format_tokens(run.tokens)
        rows.append((f"`{run.name}`", ", ".join(commits), run.precision, weights, tokens, speed))
    header = ("job", "commit", "precision", "weights", "training tokens", "tokens/s")
    return make_table(header, rows, num_text=3)
