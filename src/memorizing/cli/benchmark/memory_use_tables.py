"""What `memorizing benchmark recall` and `completion` print."""

from __future__ import annotations

from typing import Any

from memorizing.benchmark.memory_use.asking import NUM_TIMED
from memorizing.benchmark.memory_use.summary import RANKS
from memorizing.benchmark.memory_use.tables import EXPLAINED, QUALITY, make_table, write_estimate
from memorizing.benchmark.preparing import summarize_machine
from memorizing.cli.pretrained import describe_bytes
from memorizing.terminal import make_console


def print_result(result: dict[str, Any]) -> None:
    """Print quality, differences to the passages, costs, and what was found."""
    console = make_console()
    rows = result["arms"]
    if not rows:
        console.print("interrupted before the first answer: there is nothing to show")
        return
    console.print(_describe(result), highlight=False)
    keys = list(rows[0]["quality"])
    columns = [QUALITY[key][0].format(**result) for key in keys]
    console.print(
        make_table(
            "quality, with 95% intervals",
            columns,
            rows,
            lambda row: [write_estimate(row["quality"][key], QUALITY[key][1]) for key in keys],
        )
    )
    compared = [row for row in rows if row["minus_passages"]]
    if compared:
        table = make_table(
            "the same less that of memory: passages, prompt by prompt",
            columns,
            compared,
            lambda row: [
                write_estimate(row["minus_passages"][key], "+" + QUALITY[key][1]) for key in keys
            ],
        )
        console.print(table)
    console.print(
        make_table(
            "what it costs",
            ["tokens given", "stored", "first token s", "ms a token"],
            rows,
            lambda row: [
                f"{row['tokens_given']:,.0f}",
                describe_bytes(row["bytes"]) if row["bytes"] else "-",
                f"{row['first_token_s']:.2f}",
                "-" if row["token_s"] is None else f"{1000 * row['token_s']:.0f}",
            ],
        )
    )
    finding = [row for row in rows if row["found"]]
    if finding:
        table = make_table(
            "the right place is among the best passages",
            [*(f"{most}" for most in RANKS), "whole in sight", "best score"],
            finding,
            lambda row: [
                *(f"{row['found']['among'][str(most)]:.0%}" for most in RANKS),
                f"{row['found']['in_sight']:.0%}",
                "-" if row["found"]["score"] is None else f"{row['found']['score']:.3g}",
            ],
        )
        console.print(table)
    for note in _list_notes(result, bool(compared), bool(finding)):
        console.print(note, highlight=False, markup=False)


def _describe(result: dict[str, Any]) -> str:
    packages = result["packages"]
    documents, tokens = (
        sum(package[key] for package in packages) for key in ("documents", "tokens")
    )
    what = f"{documents:,} files, {tokens:,} tokens"
    if len(packages) > 1:
        what = f"{len(packages)} packages of {what}"
    if result["verb"] == "recall":
        kinds = [
            *(["names in the prompts changed"] if result["rename"] else []),
            *(["the file of a prompt not in memory"] if result["absent"] else []),
        ]
        asked = (
            f"{result['num_places']:,} prompts of {result['prompt_len']} tokens, the next "
            f"{result['answer_len']} asked for" + "".join(f"; {kind}" for kind in kinds)
        )
    else:
        asked = (
            f"{result['num_places']:,} calls to complete, after up to {result['prompt_len']} "
            "tokens of their file, which is not in memory"
        )
    return f"{result['model']}: {what}; {asked}"


def _list_notes(result: dict[str, Any], is_compared: bool, is_found: bool) -> list[str]:
    from memorizing.huggingface.attaching.attachment import describe_heads

    rows, names = result["arms"], {row["name"] for row in result["arms"]}
    memory = result["memory"]
    finders = f"layers {', '.join(map(str, memory['layers']))}"
    if memory["heads"]:
        finders = describe_heads(memory["heads"])
    short = [
        f"{row['label'].strip()} has {row['num_places']} of {result['num_places']} prompts"
        for row in rows
        if row["num_places"] < result["num_places"]
    ]
    return [
        EXPLAINED[result["verb"]],
        f"intervals: {result['num_drawn']} {result['drawn']} drawn again, and prompts in them."
        + (" *: the interval excludes zero." if is_compared else ""),
        f"passages: {memory['num_passages']} of {memory['passage_len']} tokens at most, found by "
        + finders
        + (
            "; those of BM25 and an embedder are as many as that, and as long, found by the last "
            f"{result['query_len']} tokens of the prompt."
            if any(name.startswith(("bm25", "embedder")) for name in names)
            else "."
        ),
        *(
            [
                "whole files: those that have the answer (of a longer one the part around it), at "
                f"most {result['whole_len']:,} tokens: a bound, which no search could know."
                if result["verb"] == "recall"
                else "whole files: those that define what is called (of a longer one the part "
                f"around it), at most {result['whole_len']:,} tokens: a bound."
            ]
            if "whole" in names
            else []
        ),
        *(
            [
                "right place: a passage holds the answer's first token, or ends or begins within "
                "32 tokens of it; whole in sight: all of the answer is in a passage that was given."
            ]
            if is_found
            else []
        ),
        f"first token: median, search included; a token: after the first {NUM_TIMED} prompts.",
        *result["notes"],
        *(["interrupted: " + ", ".join(short)] if short else []),
        summarize_machine(result),
    ]
