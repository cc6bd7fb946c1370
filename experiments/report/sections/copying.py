"""Memory beside what copies: n-grams of the document and kNN-LM, each alone and on top of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from comparing import Share
from formatting import (
    format_interval,
    format_number,
    format_percent,
    format_share,
    join_words,
    make_table,
)
from results import FAMILIES, Results
from section import Section, name_machines

_ABOUT = (
    "Into each token's prediction is mixed what followed in the document before, without memory "
    "and with it. *n-grams*: the followers of the longest context, up to 16 tokens, that stands "
    "earlier in the document (infini-gram), then also those of the last two tokens, the last, and "
    "none; weights depend on the length of the longest and on how often it was followed. *kNN-LM*: "
    "the tokens that followed the 1,024 nearest of the document's own hidden states (the input of "
    "the last feed-forward layer, as in its paper), with one weight. *Memory* is the present "
    "recipe's, whose entries also point at tokens (section 9). The others also hold what the "
    "model's local attention sees. Weights and temperature are fitted to each run on validation "
    "documents."
)
_COLUMNS = (
    "added",
    "without memory",
    "change (95%)",
    "by seed",
    "of memory's gain",
    "memory alone, against it",
    "with memory",
    "memory on top",
    "of its gain left",
)
_COLUMN_NOTES = (
    "*Change* is against the cache alone; *memory alone, against it* compares memory without "
    "anything added with the column before; *memory on top* what memory still changes once both "
    "models have what is added; shares are of nats."
)


def write(results: Results) -> Section | None:
    """Tables by family and size, and by class of tokens; None where nothing is measured."""
    values = results.others.get("copying")
    if values is None:
        return None
    families = [family for family in FAMILIES if family in values["families"]]
    parts = [
        _ABOUT,
        f"Repeat: `python experiments/queue --run {' '.join(f'main/{f}' for f in families)}`, "
        f"`python experiments/copying --families {' '.join(families)}`.",
        _COLUMN_NOTES,
    ]
    for family in families:
        sizes = values["families"][family]["sizes"]
        seeds = values["families"][family]["seeds"]
        for size, found in sizes.items():
            parts += [
                f"### {family.capitalize()}, a memory of {int(size):,} entries, "
                f"{'seed' if len(seeds) == 1 else 'seeds'} {', '.join(map(str, seeds))}",
                _describe_bytes(found["bytes"], values["families"][family]["documents"]),
                _make_table(found["arms"], values["arms"]),
            ]
        size, largest = max(sizes.items(), key=lambda item: int(item[0]))
        parts += [
            f"By class of tokens, {int(size):,} entries, nats a token: how many tokens the longest "
            "context has that the token has followed before, anywhere in the document. *Together* "
            "is with n-grams of all lengths and kNN-LM.",
            _make_class_table(largest["classes"]),
        ]
    machines = (machine for found in values["families"].values() for machine in found["machines"])
    parts += [_summarize(values["families"], families), name_machines(machines)]
    return Section("More than copying?", tuple(parts))


def _describe_bytes(found: Mapping[str, Any], documents: Mapping[str, int]) -> str:
    longest = max(documents.values())
    kept = found["tokens_kept"]
    shown = [
        f"{kept[name]:,} {what} of {found['per_token'][name]:,} bytes"
        f"{' (more than the longest document has)' if kept[name] >= longest else ''}"
        for name, what in (("knn_lm", "hidden states"), ("ngram", "tokens for n-grams"))
    ]
    return (
        f"{found['total'] / 2**20:.1f} MiB a document hold {kept['memory']:,} entries of "
        f"{found['per_token']['memory']:,} bytes, {join_words(shown)}."
    )


def _make_table(rows: Mapping[str, Any], names: Mapping[str, str]) -> str:
    lines = []
    for name, row in rows.items():
        alone = name == "nothing"
        by_seed = row["without"]["change_by_seed"]
        lines.append(
            (
                names[name],
                format_number(row["without"]["perplexity"]),
                "0" if alone else _format_change(row["without"]["change"]),
                ", ".join(map(format_percent, by_seed)) if len(by_seed) > 1 and not alone else "",
                "" if alone else _format_share(row["share_of_gain"]),
                _format_change(row["memory_against_it"]),
                format_number(row["with_memory"]["perplexity"]),
                _format_change(row["memory_on_top"]),
                "" if alone else _format_share(row["share_left"]),
            )
        )
    return make_table(_COLUMNS, lines)


def _make_class_table(rows: Mapping[str, Any]) -> str:
    lines = [
        (
            name,
            f"{100 * row['share_of_tokens']:.1f}%",
            *(format_number(row["without"][arm]) for arm in ("nothing", "together")),
            *(format_number(row["with_memory"][arm]) for arm in ("nothing", "together")),
            _format_change(row["memory"]),
            _format_change(row["memory_on_top"]),
            f"{round(100 * row['share_of_gain']) + 0:d}%",
        )
        for name, row in rows.items()
    ]
    header = (
        "followed before", "of tokens", "cache alone", "together", "memory", "memory and together",
        "memory's change", "on top of together", "of memory's gain",
    )  # fmt: skip
    return make_table(header, lines)


def _summarize(found: Mapping[str, Any], families: list[str]) -> str:
    """Where memory is ahead of all that copies, and where something of it is left on top."""
    ahead, adds, num = [], [], 0
    for family in families:
        for size, measured in found[family]["sizes"].items():
            num += 1
            row, place = measured["arms"]["together"], f"{family} with {int(size):,}"
            ahead += [place] if _is_below_zero(row["memory_against_it"]) else []
            adds += [place] if _is_below_zero(row["memory_on_top"]) else []
    return (
        f"Of {num} comparisons at equal bytes, memory alone is ahead of n-grams and kNN-LM "
        f"together, with an interval below zero, in {join_words(ahead)}; it adds to them in "
        f"{join_words(adds)}."
    )


def _is_below_zero(change: Mapping[str, Any]) -> bool:
    return change["high"] is not None and change["high"] < 0


def _format_change(change: Mapping[str, Any]) -> str:
    if change["low"] is None:
        return format_percent(change["value"])
    return format_interval(change["value"], change["low"], change["high"])


def _format_share(share: Mapping[str, Any]) -> str:
    """Without an interval there is no gain that it could be a share of."""
    if share["low"] is None:
        return "no gain"
    return format_share(Share(share["value"], (share["low"], share["high"])))
