"""Standard tests, and what others report of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from comparing import Share
from formatting import MISSING, format_share, make_table
from results import Results
from section import Section, name_machine

LOOK_UP = ("above 92%", "16M", "Focused Transformer, 37M weights (arXiv 2307.03170)")
RECALL = ("solved", "512", "attention, 64 pairs (arXiv 2312.04927)")
PASSKEY = ("100%", "64M", "RAMba, hierarchical sparse attention (arXiv 2504.16795)")
NEEDLES = ("94.8%", "1M", "Memory Sparse Attention, 4B weights (arXiv 2603.23516)")
"""What others report: how many answers are right, after how many tokens, and who."""

_NIAH = "niah"
"""How the names of RULER's tasks with needles begin."""
_ABOUT_RULER = (
    "Six of its tasks need no download: needles among repeated sentences (`niah_single_1`) and "
    "among other needles (`niah_multikey_2`, `niah_multikey_3`), chains of variables (`ruler_vt`), "
    "common and frequent words (`ruler_cwe`, `ruler_fwe`). A score is the mean share of the "
    "expected strings that stand in the greedy answer. *window* sees the prompt's last tokens "
    "alone, *native* as much as the model was trained for, *entries* and *passages* have a memory "
    "of what is before the window. Repeat: `python experiments/pretrained/ruler.py`."
)


def write(results: Results) -> Section:
    """The longest that is measured beside what others report, then RULER."""
    ruler = results.others.get("pretrained_ruler")
    found = {
        "dictionary look-up": (LOOK_UP, _find_look_up(results.others.get("dictionary_lookup"))),
        "multi-query associative recall": (
            RECALL,
            _find_recall(results.others.get("synthetic_recall")),
        ),
        "passkey": (PASSKEY, _find_passkey(results.others.get("pretrained_passkey"))),
        "RULER, needles": (NEEDLES, _find_needles(ruler)),
    }
    rows = [
        (test, theirs[2], theirs[0], theirs[1], *ours) for test, (theirs, ours) in found.items()
    ]
    return Section(
        "Standard tests, and what others report",
        (
            "The longest that is measured of ours beside the longest that others report. Models "
            "differ in size and in what they were trained for: it says how far each goes, and not "
            "which is better.",
            make_table(("test", "others", "right", "tokens", "our model", "right", "tokens"), rows),
            "### RULER",
            _ABOUT_RULER,
            "**Not run yet.**" if ruler is None else _write_ruler(ruler),
        ),
    )


def _find_look_up(values: Mapping[str, Any] | None) -> tuple[str, str, str]:
    """By the factor of the memory's scale that answers most at the longest."""
    if values is None:
        return "", MISSING, ""
    by_length: dict[int, dict[str, list[Mapping[str, Any]]]] = {}
    for scores in values["scores"].values():
        for name, score in scores.items():
            arm, _, length = name.partition("/")
            if arm.startswith("memory"):
                by_length.setdefault(int(length), {}).setdefault(arm, []).append(score)
    longest = max(by_length)
    right, whole = max(
        tuple(sum(s[key] for s in scores) / len(scores) for key in ("first", "first_whole"))
        for scores in by_length[longest].values()
    )
    model = f"a small one, {values['weights']:,} weights"
    return model, f"{right:.1%} (whole values {whole:.1%})", f"{longest:,}"


def _find_recall(values: Mapping[str, Any] | None) -> tuple[str, str, str]:
    """With the most pairs among the most tokens, over seeds."""
    if values is None:
        return "", MISSING, ""
    cells = values["settings"]["cells"]
    cell = max(cells, key=lambda cell: (cell["num_blocks"], cell["sizes"]["num_pairs"]))
    pairs, blocks = cell["sizes"]["num_pairs"], cell["num_blocks"]
    name = f"memory/{blocks} blocks, pairs {pairs}"
    scores = [scores[name] for scores in values["seeds"].values() if name in scores]
    right, asked = (sum(score[key] for score in scores) for key in ("right", "asked"))
    tokens = (blocks + 1) * values["settings"]["block_len"]
    return f"a small one, {pairs:,} pairs", f"{right / asked:.1%}", f"{tokens:,}"


def _find_passkey(values: Mapping[str, Any] | None) -> tuple[str, str, str]:
    if values is None:
        return "", MISSING, ""
    lengths = values["arms"]["memory"]
    longest = max(lengths, key=int)
    return "SmolLM2-135M, finetuned", f"{lengths[longest]['share']:.0%}", f"{int(longest):,}"


def _find_needles(values: Mapping[str, Any] | None) -> tuple[str, str, str]:
    """The mean of the tasks with needles, by passages."""
    cells = values["cells"] if values else []
    cells = [c for c in cells if c["arm"] == "passages" and c["task"].startswith(_NIAH)]
    if values is None or not cells:
        return "", MISSING, ""
    longest = max(cell["length"] for cell in cells)
    shares = [cell["share"] for cell in cells if cell["length"] == longest]
    return f"{values['model']}, passages", f"{sum(shares) / len(shares):.1%}", f"{longest:,}"


def _write_ruler(values: Mapping[str, Any]) -> str:
    """A line for each length and task, a column for each arm."""
    cells = {(c["length"], c["task"], c["arm"]): c for c in values["cells"]}
    arms = list(dict.fromkeys(arm for _, _, arm in cells))
    rows = []
    for length, task in dict.fromkeys((length, task) for length, task, _ in cells):
        found = [cells.get((length, task, arm)) for arm in arms]
        shares = (c and format_share(Share(c["share"], (c["low"], c["high"]))) for c in found)
        rows.append((f"{length:,}", f"`{task}`", *(share or "" for share in shares)))
    about = (
        f"{values['model']}, {values['samples']} samples of each task, a window of "
        f"{values['window']} tokens, entries in layer {values['layer']}, {values['precision']}."
    )
    table = make_table(("tokens", "task", *arms), rows, num_text=2)
    return f"{about}\n\n{table}\n\n{name_machine(values)}"
