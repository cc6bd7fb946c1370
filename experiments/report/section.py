"""A part of the page."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from formatting import format_tokens
from results import Run


@dataclass(frozen=True)
class Section:
    """A part of the page under one heading."""

    title: str
    parts: tuple[str, ...]
    """Paragraphs, tables and pictures, in Markdown."""
    pictures: dict[str, bytes] = field(default_factory=dict)
    """PNG files by the name that the parts show them by."""

    def to_markdown(self) -> str:
        """Heading and parts; empty parts are left out."""
        return "\n\n".join([f"## {self.title}", *(part for part in self.parts if part)])


def show_picture(name: str, what: str) -> str:
    """Markdown of a picture that lies beside the page."""
    return f"![{what}]({name})"


def describe_sources(runs: Sequence[Run], command: str, *, reads: bool = True) -> str:
    """How to repeat it, and from which commits, seeds and training tokens the numbers are.

    Args:
        runs: what is shown.
        command: that makes them.
        reads: whether what is shown are their evaluations; says how much of a document these read.
    """
    repeat = f"Repeat: `{command}`."
    if not runs:
        return f"**Not run yet.** {repeat}"
    commits = sorted({shorten_commit(commit) for run in runs for commit in run.values["commits"]})
    seeds = sorted({run.seed for run in runs})
    tokens = sorted({format_tokens(run.tokens) for run in runs}, key=lambda text: float(text[:-1]))
    trained = tokens[0] if len(tokens) == 1 else f"{tokens[0]} to {tokens[-1]}"
    return (
        f"{repeat} {len(runs)} {'run' if len(runs) == 1 else 'runs'}, "
        f"{'seed' if len(seeds) == 1 else 'seeds'} {', '.join(map(str, seeds))}, {trained} "
        f"training tokens; {'commit' if len(commits) == 1 else 'commits'} {', '.join(commits)}."
        f"{_describe_lengths(runs) if reads else ''}"
    )


def _describe_lengths(runs: Sequence[Run]) -> str:
    """How much is read of the longest document; where a memory is larger, that it does not fill."""
    evaluations = [evaluation for run in runs for evaluation in run.evaluations.values()]
    longest = max((d["tokens"] for e in evaluations for d in e["documents"]), default=0)
    if not longest:
        return ""
    text = f" At most {longest:,} tokens of a held-out document are read"
    if max(evaluation["capacity"] for evaluation in evaluations) > longest:
        text += ", so that larger memories hold no more than that"
    return f"{text}."


def name_machines(machines: Iterable[Mapping[str, Any]]) -> str:
    """A sentence on where something was measured; files from before machines were named have none.

    Args:
        machines: as `describe_machine` of the package gives them; each is named once.
    """
    from memorizing.benchmark.preparing import summarize_machine

    named = dict.fromkeys(summarize_machine(dict(machine)) for machine in machines)
    return f"Measured on {'; and on '.join(named)}." if named else ""


def name_machine(values: Mapping[str, Any] | None) -> str:
    """As `name_machines`, of a JSON file that names at most one."""
    return name_machines([values["machine"]] if values and "machine" in values else [])


def shorten_commit(commit: str) -> str:
    """Twelve digits, and what is said about changes."""
    digits, _, rest = commit.partition(" ")
    return f"{digits[:12]} {rest}".strip()
