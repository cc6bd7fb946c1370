"""Markdown tables and numbers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from comparing import Change, Share

MISSING = "not run yet"


def make_table(header: Sequence[str], rows: Iterable[Sequence[str]], num_text: int = 1) -> str:
    """A table; all but the first `num_text` columns are numbers, on the right."""
    rule = ["---" if column < num_text else "---:" for column in range(len(header))]
    return "\n".join(f"| {' | '.join(line)} |" for line in (header, rule, *rows))


def format_number(value: float | None, digits: int = 2) -> str:
    """With `digits` decimals."""
    return MISSING if value is None else f"{value:.{digits}f}"


def format_percent(value: float | None, digits: int = 1) -> str:
    """A change with its sign; minus zero is plus zero."""
    if value is None:
        return MISSING
    return f"{round(100 * value, digits) + 0.0:+.{digits}f}%"


def format_change(change: Change | None) -> str:
    """A change and its interval."""
    if change is None:
        return MISSING
    if change.interval is None:
        return format_percent(change.value)
    return format_interval(change.value, *change.interval)


def format_interval(value: float, low: float, high: float, digits: int = 1) -> str:
    """A change and the ends of its interval."""
    ends = (format_percent(end, digits).removesuffix("%") for end in (low, high))
    return f"{format_percent(value, digits)} ({' to '.join(ends)})"


def format_difference(values: Mapping[str, Any], digits: int = 1) -> str:
    """A change of perplexity and its interval, as `Difference.to_dict` of the metrics has them."""
    ends = (values[f"perplexity_{end}"] for end in ("change", "low", "high"))
    return format_interval(*ends, digits=digits)


def format_seeds(change: Change | None) -> str:
    """Changes by seed, where there are several."""
    if change is None or len(change.by_seed) < 2:
        return ""
    return ", ".join(format_percent(value) for value in change.by_seed.values())


def format_share(share: Share | None) -> str:
    """A share of a gap and its interval, in percent."""
    if share is None:
        return MISSING
    low, high = (f"{100 * end:.0f}" for end in share.interval)
    return f"{100 * share.value:.0f}% ({low} to {high})"


def format_tokens(tokens: int) -> str:
    """In millions."""
    return f"{tokens / 1e6:.1f}M"


def format_capacity(capacity: int) -> str:
    """Entries of a memory; none is a dash."""
    return f"{capacity:,}" if capacity else "-"


def join_words(words: Sequence[str], none: str = "none") -> str:
    """A, b and c."""
    if len(words) < 2:
        return words[0] if words else none
    return f"{', '.join(words[:-1])} and {words[-1]}"
