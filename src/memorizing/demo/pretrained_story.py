"""What the demo of a pre-trained model tells: what was asked, what came of it, and how to go on."""

from __future__ import annotations

import os.path
import re
import shlex
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.rule import Rule
from rich.text import Text

from memorizing.benchmark.memory_use.completion import is_exact
from memorizing.benchmark.memory_use.places import Package, Place
from memorizing.benchmark.memory_use.tables import EXPLAINED, QUALITY, make_table, write_estimate
from memorizing.benchmark.preparing import summarize_machine
from memorizing.huggingface.sessions.sources import find_lines

_WIDTH = 72
"""Characters of a line that is shown."""
_DEFINED = re.compile(r"^def \w+\(", re.MULTILINE)
_VERBS = {"quotes": "recall", "calls": "completion"}
_LABELS = {"passages": "with the memory", "nothing": "without it", "bm25": "pasted"}
"""In the order in which they are shown."""


def introduce(name: str, num_weights: int, *, is_older: bool) -> RenderableType:
    """What is shown, and on what."""
    newer = (
        ", which is younger than the model: it cannot know it by heart"
        if is_older
        else " (what a model was trained on it may know by heart: see what it says without memory)"
    )
    return Group(
        Rule("memorizing: a model quotes what it has read once", align="left"),
        Text(
            f"{Path(name).name} has {num_weights / 1e6:,.0f} million weights, and none of them is "
            f"changed. It reads source code of this package{newer}. Then it goes on from prompts "
            "drawn from what it read. Some five minutes on two cores; Ctrl-C shows what is there."
        ),
        Padding(
            Text.assemble(
                ("with the memory", "bold"),
                "  attention and words find passages of what was read,\n"
                "                 and all layers read these before the prompt\n",
                ("without it", "bold"),
                "       the same weights, the prompt alone\n",
                ("pasted", "bold"),
                "           no memory, but as much text before the prompt: the\n"
                "                 passages that BM25 finds by the prompt's words",
            ),
            (1, 0, 1, 2),
        ),
    )


def tell_reading(result: Mapping[str, Any], memory: Any) -> RenderableType:
    """What was read, how fast, and where it is."""
    source, seconds = result["source"], result["seconds"]["reading"]
    return Text(
        f"It has read {source['documents']:,} of {source['of_documents']:,} files, drawn with seed "
        f"{result['seed']}: {source['tokens']:,} tokens in {seconds:,.0f} s, "
        f"{source['tokens'] / seconds:,.0f} a second, each once. They are kept in {memory}."
    )


def tell_part(
    part: str,
    found: Mapping[str, Any],
    places: Sequence[Place],
    package: Package,
    tokenizer: Any,
    num_shown: int,
) -> RenderableType:
    """The first prompts whole, and a table of all."""
    title, text = {
        "quotes": (
            "Does it say what it has read?",
            f"{len(places)} prompts of {len(places[0].prompt)} tokens from {found['num_drawn']} of "
            f"these files, drawn with the seed; asked for are the {len(places[0].answer)} tokens "
            f"that stand next. The first {num_shown}, as they came:",
        ),
        "calls": (
            "Does it use it?",
            f"{len(places)} calls, drawn with the seed, of what another file defines. The file of "
            "the call is left out of the memory then; asked for are the arguments. The first, as "
            "it came:",
        ),
    }[part]
    shown = zip(found["places"][:num_shown], places, strict=False)
    blocks = [
        _show_place(part, number, asked, place, package, tokenizer)
        for number, (asked, place) in enumerate(shown, 1)
        if asked["arms"]
    ]
    return Group(Text(), Rule(title, align="left"), Text(text), *blocks, _tabulate(part, found))


def _show_place(
    part: str, number: int, asked: Mapping[str, Any], place: Place, package: Package, tokenizer: Any
) -> RenderableType:
    where = place.document
    if part == "quotes":
        tokens = package.find(where).tokens[: place.sources[0].token]
        where += f", line {tokenizer.decode(list(tokens)).count(chr(10)) + 1}"
    else:
        where += f", which calls what {place.sources[0].document} defines"
    parts: list[RenderableType] = [
        Text(f"\n{number}. {where}", "bold"),
        Text("   prompt"),
        _quote(asked["prompt"]),
        Text("   what stands there next"),
        _quote(asked["answer"]),
    ]
    for name, label in _LABELS.items():
        if (one := asked["arms"].get(name)) is None:
            continue
        right = (
            f"{one['num_right']} of {one['num_tokens']} right"
            if part == "quotes"
            else (
                "right" if is_exact(one["written"], asked["answer"]) else "not as it stands there"
            )
        )
        speed = "" if one["token_s"] is None else f", {1000 * one['token_s']:.0f} ms a token"
        parts += [
            Text.assemble(
                "   ", (label, "bold"), f": {right}; first token {one['first_s']:.1f} s{speed}"
            ),
            _quote(one["written"], asked["answer"]),
        ]
        if one["found"]:
            sources = "; ".join(
                _name_source(source, name, package, tokenizer) for source in one["found"]
            )
            parts.append(Padding(Text(f"from {sources}"), (0, 0, 0, 5)))
    return Group(*parts)


def _quote(text: str, answer: str = "") -> RenderableType:
    """Lines as they are, long ones folded; what an answer begins with is green."""
    right = len(os.path.commonprefix([text, answer]))
    shown = Text(text or "(nothing)")
    shown.stylize("green", 0, right)
    folded = [
        line[first : first + _WIDTH]
        for line in shown.split("\n", allow_blank=True)
        for first in range(0, max(1, len(line)), _WIDTH)
    ]
    bar = "\N{BOX DRAWINGS LIGHT VERTICAL} "
    lines = Text("\n").join(Text.assemble(bar, line) for line in folded)
    lines.no_wrap = True
    return Padding(lines, (0, 0, 0, 5))


def _name_source(source: Mapping[str, Any], arm: str, package: Package, tokenizer: Any) -> str:
    """Document, lines, and the share of attention or the score of words."""
    document = package.find(source["document"])
    start, end = (
        len(tokenizer.decode(list(document.tokens[: source[edge]]))) for edge in ("start", "end")
    )
    first, last = find_lines(document.text, start, end)
    score = source["score"]
    weight = f"{score:.0%}" if arm == "passages" else f"score {score:.0f}"
    return f"{source['document']} {first}-{last} ({weight})"


def _tabulate(part: str, found: Mapping[str, Any]) -> RenderableType:
    rows = found["arms"]
    if not rows:
        return Text("interrupted before the first answer: there is nothing to show")
    answer_len = max(
        one["num_tokens"] for place in found["places"] for one in place["arms"].values()
    )
    keys = list(rows[0]["quality"])
    count = max(row["num_places"] for row in rows)
    return Group(
        Text(),
        make_table(
            f"all {count}, with 95% intervals",
            [QUALITY[key][0].format(answer_len=answer_len) for key in keys],
            rows,
            lambda row: [write_estimate(row["quality"][key], QUALITY[key][1]) for key in keys],
        ),
        make_table(
            "what it costs",
            ["tokens before the prompt", "first token s", "ms a token"],
            rows,
            lambda row: [
                f"{row['tokens_given']:,.0f}",
                f"{row['first_token_s']:.2f}",
                "-" if row["token_s"] is None else f"{1000 * row['token_s']:.0f}",
            ],
        ),
        Text(EXPLAINED[_VERBS[part]]),
    )


def conclude(result: Mapping[str, Any], notes: Sequence[str], *, is_older: bool) -> RenderableType:
    """What the tables say, whatever that is, and what to expect of such a model."""
    rows = {row["name"]: row for row in result["quotes"]["arms"]}
    parts = []
    if {"passages", "nothing"} <= rows.keys():
        memory, alone = rows["passages"], rows["nothing"]
        right, without = (row["quality"]["right"]["value"] for row in (memory, alone))
        parts.append(
            f"With its memory the model says {right:.1f} tokens right of what it has read once, "
            f"and {without:.1f} without. Its first token takes {memory['first_token_s']:.1f} s "
            f"instead of {alone['first_token_s']:.1f}: the passages are read before the prompt."
        )
    if "passages" in rows and "bm25" in rows:
        pasted = rows["bm25"]["minus_passages"]["right"]
        interval = pasted["interval"]
        ends = "" if interval is None else f" ({0 - interval[1]:+.1f} to {0 - interval[0]:+.1f})"
        verdict = (
            "beyond what chance gives."
            if pasted["excludes_zero"]
            else "so few prompts do not tell which is better."
        )
        parts.append(
            f"Beside as much text pasted that is {0 - pasted['value']:+.1f} tokens{ends}, "
            f"{verdict} Passages are found by the model's own attention and by the words of the "
            "prompt, anew every 32 tokens that it writes; nothing is put into a prompt by hand."
        )
    completed = {
        row["name"]: round(row["quality"]["exact"]["value"] * row["num_places"])
        for row in result["calls"]["arms"]
    }
    counts = [f"{completed[name]} {said}" for name, said in _LABELS.items() if name in completed]
    parts.append(
        f"Of {result['calls']['num_places']} calls it completes as they stand {', '.join(counts)}. "
        "A model of this size that nothing was trained of quotes and goes on, it does not reason: "
        "it finds what looks like the prompt, and says what stands there next."
    )
    total = sum(result["seconds"].values())
    times = ", ".join(f"{part} {seconds:,.0f} s" for part, seconds in result["seconds"].items())
    parts.append(
        f"From reading on it took {total / 60:.1f} minutes: {times}. "
        + summarize_machine(result["quotes"])
    )
    return Group(
        Text(), Rule("What that says", align="left"), Text("\n\n".join([*parts, *notes])), Text()
    )


THREE_LINES = """\
memorizing.add_memory(model)
with memorizing.open_memory(model, "mine", tokenizer=tokenizer) as memory:
    memory.read(tokenizer, documents)
"""
"""The same for another model."""


def point_to(result: Mapping[str, Any], package: Package) -> list[RenderableType]:
    """What was kept, and how to go on with it and with a model of one's own.

    Commands and lines of code are not to be wrapped, so that they can be copied: every second one.
    """
    model, memory = (shlex.quote(result[key]) for key in ("model", "memory"))
    source = result["source"]
    defined = (_DEFINED.search(document.text) for document in package.documents)
    prompt = next((found[0] for found in defined if found), "def ")
    left = source["tokens_left"] * result["seconds"]["reading"] / source["tokens"] / 60
    return [
        Group(
            Rule("Where to go from here", align="left"),
            Text(
                "The model and what it has read are kept. Ask something else, on the command line "
                "or on a page; let it read the other files too; ask about files of yours:"
            ),
        ),
        Text(
            f"\n  memorizing generate {model} \\\n"
            f"      --memory {memory} --sources \\\n      --prompt '{prompt}'\n"
            f"  memorizing serve {model} \\\n      --memory {memory}\n"
            f"  memorizing read {model} \\\n"
            f"      {shlex.quote(source['folder'])} \\\n"
            f"      --memory {memory}    # about {max(1, left):,.0f} minutes\n"
            f"  memorizing benchmark recall {model} FOLDER\n"
        ),
        Text(
            "The same for a model of yours, in three lines of Python. documents: pairs of name and "
            "text; inside of the with block model.generate(...) reads the memory."
        ),
        Text("\n" + textwrap.indent(THREE_LINES, "  ")),
    ]
