"""What is kept of a pair of runs for good: sums over blocks of the test documents, in a JSON file.

Arrays by token are too large to keep with the results, and weights are gone with the machine that
trained them. Sums over blocks are enough for every table and interval, whichever seeds are there.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from classes import sum_classes, summarize_classes
from measuring import Unit, load_arrays, read_choices
from numpy.typing import NDArray
from summary import (
    ARMS,
    BLOCK_LEN,
    Document,
    Layout,
    Matcher,
    Nats,
    describe_bytes,
    predict_test,
    sum_blocks,
    summarize,
)

from memorizing.errors import ConfigError

Pair = dict[str, Any]
_DIGITS = 4
"""Decimals of sums of nats."""


def describe_pair(units: Mapping[str, Sequence[Unit]], sizes: Sequence[int]) -> Pair:
    """Of a pair of runs that are measured: their documents, and by size the sums of every arm.

    Args:
        units: `without` memory, one for all sizes, and `with_memory`, one for each.
        sizes: of the memory, in entries.

    Raises:
        ConfigError: the runs have read other test tokens.
    """
    matcher, tokens = Matcher(), dict[str, NDArray[np.int32]]()
    (alone,) = units["without"]
    config = alone.config
    found = {}
    for size, unit_with in zip(sizes, units["with_memory"], strict=True):
        nats: dict[str, dict[str, Nats]] = {}
        choices = {}
        for model, unit in (("without", alone), ("with_memory", unit_with)):
            choices[model] = read_choices(unit)[str(size)]
            validation, test = (
                matcher.extend(load_arrays(unit, use, size, choices[model]), config.model)
                for use in ("validation", "test")
            )
            check_same_tokens(tokens, test, unit)
            nats[model] = {n: predict_test(validation, test, arm) for n, arm in ARMS.items()}
        followed = [matcher.match(part, len(part)).followed for part in tokens.values()]
        found[str(size)] = {
            "bytes": describe_bytes(config.model, size),
            "choices": choices,
            "nats": {
                model: {name: sum_blocks(values) for name, values in arms.items()}
                for model, arms in nats.items()
            },
            "classes": sum_classes(**nats, followed=followed),
        }
    return {
        "max_tokens": alone.max_tokens,
        "block_len": BLOCK_LEN,
        "documents": {
            name: {"tokens": len(part), "sha256": hashlib.sha256(part.tobytes()).hexdigest()}
            for name, part in tokens.items()
        },
        "recipes": {model: _describe_recipe(units[model][0].config.to_dict()) for model in units},
        "sizes": _round(found),
    }


def _describe_recipe(config: dict[str, Any]) -> dict[str, Any]:
    """What all seeds have in common."""
    training = {name: value for name, value in config["training"].items() if name != "seed"}
    return {"model": config["model"], "training": training}


def _round(values: Any) -> Any:
    """Arrays as lists, numbers of few digits."""
    if isinstance(values, dict):
        return {name: _round(value) for name, value in values.items()}
    if isinstance(values, np.ndarray | np.number):
        rounded = values if np.issubdtype(values.dtype, np.integer) else values.round(_DIGITS)
        return rounded.tolist()
    return values


def check_same_tokens(
    known: dict[str, NDArray[np.int32]], documents: Sequence[Document], unit: Unit
) -> None:
    """Note the tokens of the documents, by name, where none are known: all must read the same.

    Raises:
        ConfigError: they are others than those known.
    """
    tokens = {document.arrays.name: document.arrays.tokens for document in documents}
    known.update(known or tokens)
    if list(known) != list(tokens) or not all(map(np.array_equal, known.values(), tokens.values())):
        raise ConfigError(
            f"{unit.run_dir} has read other test tokens than the runs before it; give runs of one "
            "tokenizer and recipe"
        )


def name_pair(folder: Path, family: str, seed: int) -> Path:
    """Its file."""
    return folder / f"{family}-seed{seed}.json"


def load_pairs(folder: Path) -> dict[str, dict[int, Pair]]:
    """All pairs of a folder, by family and seed."""
    found: dict[str, dict[int, Pair]] = {}
    for path in sorted(folder.glob("*-seed*.json")):
        family, _, seed = path.stem.rpartition("-seed")
        found.setdefault(family, {})[int(seed)] = json.loads(path.read_text(encoding="utf-8"))
    return found


def collect_family(pairs: Mapping[int, Pair]) -> dict[str, Any]:
    """The tables of a family, by size of the memory, over the seeds.

    Raises:
        ConfigError: pairs of other recipes, or that have read other tokens.
    """
    first, *others = pairs.values()
    for seed, pair in pairs.items():
        differing = [k for k in ("recipes", "documents", "block_len") if pair[k] != first[k]]
        if differing:
            raise ConfigError(
                f"the pair of seed {seed} has other {' and '.join(differing)} than that of seed "
                f"{next(iter(pairs))}; take the file of the one that is outdated away"
            )
    lens = [document["tokens"] for document in first["documents"].values()]
    layout = Layout(tuple(lens))
    sizes = {}
    for size, described in first["sizes"].items():
        if not all(size in pair["sizes"] for pair in others):
            continue
        found = [pair["sizes"][size] for pair in pairs.values()]
        nats = {
            model: {
                arm: [np.array(one["nats"][model][arm]) for one in found]
                for arm in described["nats"][model]
            }
            for model in described["nats"]
        }
        sizes[size] = {
            "bytes": described["bytes"],
            "choices": {model: [one["choices"][model] for one in found] for model in nats},
            "arms": summarize(**nats, layout=layout),
            "classes": summarize_classes([one["classes"] for one in found], layout),
        }
    return {
        "seeds": list(pairs),
        "documents": dict(zip(first["documents"], lens, strict=True)),
        "sizes": sizes,
        "machines": [pair["machine"] for pair in pairs.values()],
    }
