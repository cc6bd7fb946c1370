"""Examples as text for a terminal of 80 columns, with or without color."""

from __future__ import annotations

import re
from collections.abc import Sequence

from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.text import Text

from memorizing.analysis.examples import Example

_BEFORE, _AFTER = 150, 70
"""Characters shown on either side."""


def render_examples(
    examples: Sequence[Example], *, baseline_name: str = "without memory"
) -> RenderableType:
    """Each example with its text and what was retrieved, for `rich.print`.

    Args:
        examples: what to show.
        baseline_name: what the first probability is of.
    """
    blocks: list[RenderableType] = []
    for number, example in enumerate(examples, start=1):
        title = Text.assemble(
            (f"{number}. {example.document}", "bold"), (f", token {example.position:,}", "dim")
        )
        odds = Text.assemble(
            "probability of ",
            _mark(example.token, "bold green"),
            f": {_percent(example.baseline_probability)} {baseline_name}, ",
            (f"{_percent(example.probability)} with memory", "bold"),
        )
        blocks += [title, Padding(odds, (0, 0, 0, 3), expand=False)]
        blocks.append(_quote("it reads", example.before, example.token, example.after))
        for place in example.places:
            label = (
                f"retrieved from {place.tokens_ago:,} tokens before "
                f"({_percent(place.share)} of the weight)"
            )
            blocks.append(_quote(label, place.before, place.entry, place.after))
        if not example.places:
            blocks.append(
                Padding(Text("nothing retrieved for this token", "dim"), (0, 0, 0, 3), expand=False)
            )
        blocks.append(Text())
    return Group(*blocks)


def _quote(label: str, before: str, token: str, after: str) -> RenderableType:
    before, after = _flatten(before), _flatten(after)
    if len(before) > _BEFORE:
        before = "…" + before[-_BEFORE:]
    if len(after) > _AFTER:
        after = after[:_AFTER] + "…"
    quote = Text.assemble(before, _mark(token, "bold green"), after)
    return Group(
        Padding(Text(label, "dim"), (0, 0, 0, 3), expand=False),
        Padding(quote, (0, 0, 0, 6), expand=False),
    )


def _mark(token: str, style: str) -> tuple[str, str]:
    """Guillemets, so that the token is seen without color too."""
    return f"«{_flatten(token)}»" if token else "«start of document»", style


def _flatten(text: str) -> str:
    """One line: line breaks as a sign, runs of white space as one space."""
    text = re.sub(r"[ \t]*[\r\n]\s*", " ⏎ ", text)
    return re.sub(r"[^\S\n]+", " ", text)


def _percent(share: float) -> str:
    if share < 0.001:
        return "under 0.1%"
    return f"{share:.1%}" if share < 0.1 else f"{share:.0%}"
