"""Is memory more than copying? A document's n-grams and kNN-LM, beside memory and on top of it.

    python experiments/queue --run main/proofs main/code  # trains: cache only, with memory
    python experiments/copying                            # goes on where it stopped
    python experiments/copying --families code --seeds 0  # a part of it

A pair of runs that has a file in `experiments/results/copying` is not measured again. The queue
trains nothing that has a result; where the weights behind a result are gone, give it another
`--results` folder.

Two runs that have read the same tokens, one without memory and one with it, read held-out
documents. Into the predictions of both are mixed, one by one and together:

- the followers of the longest context that stands earlier in the document (`ngram.py`);
- those of shorter contexts as well;
- kNN-LM over the document's own hidden states (`knn_lm.py`).

Each keeps as many of the latest tokens as fit into the bytes of a memory of N entries. Weights and
temperature are fitted to each run on the validation documents (`fitting.py`). Several processes may
share the work: start the same command in each. Arrays by token go to `runs/copying`.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch
from measuring import Unit, check_trained, measure
from pairs import collect_family, describe_pair, load_pairs, name_pair
from rich.console import Console
from rich.table import Table
from summary import ARMS

from memorizing.benchmark.preparing import describe_machine
from memorizing.cli.pretrained import choose_device
from memorizing.errors import ConfigError, MemorizingError
from memorizing.storage.files import write_json
from memorizing.storage.locks import try_lock

ARM_NAMES = {"without": "cache", "with_memory": "memory"}
"""Arms of the queue's main experiment."""
RESULTS = Path("experiments/results")


def main(arguments: list[str] | None = None) -> int:
    """Measure what is not measured yet, print, write the JSON; status 2 after an error."""
    options = _parse(arguments)
    try:
        if not _measure_all(options):
            print("others measure the rest; run the same command again for the tables")
            return 0
        values = collect(options.pairs)
        write_json(options.json, values)
    except MemorizingError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; run the same command again to go on", file=sys.stderr)
        return 130
    show(values)
    return 0


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="copying",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--families", nargs="+", default=["proofs", "code"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--capacities", nargs="+", type=int, default=[65_536])
    parser.add_argument("--tokens", type=int, default=0, help="of each document; 0: the recipe's")
    parser.add_argument(
        "--runs", type=Path, default=Path("runs/experiments"), help="where the queue trains"
    )
    parser.add_argument("--arrays", type=Path, default=Path("runs/copying"))
    parser.add_argument(
        "--pairs", type=Path, default=RESULTS / "copying", help="a file for each pair of runs"
    )
    parser.add_argument("--json", type=Path, default=RESULTS / "copying.json")
    parser.add_argument("--device", default="auto", help="cpu, cuda; auto is cuda if there is one")
    return parser.parse_args(arguments)


def plan_units(options: argparse.Namespace, family: str, seed: int) -> dict[str, list[Unit]]:
    """What is read for a family and seed: without memory once, with memory at each size."""
    sizes = {"without": [(0, tuple(options.capacities))]}
    sizes["with_memory"] = [(capacity, (capacity,)) for capacity in options.capacities]
    units = {}
    for model, name in ARM_NAMES.items():
        run = f"{family}-{name}-seed{seed}"
        units[model] = [
            Unit(
                options.runs / "main" / run,
                options.arrays / run / str(capacity),
                capacity,
                kept,
                options.tokens,
            )
            for capacity, kept in sizes[model]
        ]
    return units


def _measure_all(options: argparse.Namespace) -> bool:
    """Whether all is measured; what another process does is left to it."""
    planned = {
        path: plan_units(options, family, seed)
        for seed in options.seeds
        for family in options.families
        if not _is_kept(path := name_pair(options.pairs, family, seed), options)
    }
    for units in planned.values():
        _check_pair(units)
    device = torch.device(choose_device(options.device))
    is_whole = True
    for path, units in planned.items():
        are_mine = [_measure_unit(unit, device) for model in units.values() for unit in model]
        if all(are_mine):
            pair = describe_pair(units, options.capacities) | {"machine": describe_machine()}
            path.parent.mkdir(parents=True, exist_ok=True)
            write_json(path, pair)
        is_whole &= all(are_mine)
    return is_whole


def _measure_unit(unit: Unit, device: torch.device) -> bool:
    """Whether it is measured now; False where another process is at it."""
    unit.folder.mkdir(parents=True, exist_ok=True)
    with try_lock(unit.folder / "lock") as is_mine:
        if is_mine:
            measure(unit, device)
        return is_mine


def _is_kept(path: Path, options: argparse.Namespace) -> bool:
    """Whether a pair has a file with all that is asked for."""
    if not path.is_file():
        return False
    pair = json.loads(path.read_text(encoding="utf-8"))
    has_sizes = all(str(capacity) in pair["sizes"] for capacity in options.capacities)
    return has_sizes and pair["max_tokens"] == options.tokens


def _check_pair(units: dict[str, list[Unit]]) -> None:
    """Refuse to compare models that have not read the same tokens."""
    pair = [units[model][0].run_dir for model in ARM_NAMES]
    tokens = [check_trained(run_dir)["tokens"] for run_dir in pair]
    if tokens[0] != tokens[1]:
        raise ConfigError(
            f"{pair[0]} was trained on {tokens[0]:,} tokens and {pair[1]} on {tokens[1]:,}; train "
            "both by the same recipe and seed"
        )


def collect(folder: Path) -> dict[str, Any]:
    """All tables of the pairs in a folder, as plain values."""
    return {
        "families": {family: collect_family(pairs) for family, pairs in load_pairs(folder).items()},
        "arms": {name: arm.about for name, arm in ARMS.items()},
    }


def show(values: dict[str, Any]) -> None:
    """A table for each family and size."""
    for family, found in values["families"].items():
        for size, measured in found["sizes"].items():
            table = Table(
                "added", "without", "change", "of the gain", "with memory", "memory on top",
                title=f"{family}, {int(size):,} entries",
            )  # fmt: skip
            for name, row in measured["arms"].items():
                table.add_row(
                    name,
                    f"{row['without']['perplexity']:.2f}",
                    f"{row['without']['change']['value']:+.1%}",
                    f"{row['share_of_gain']['value']:.0%}",
                    f"{row['with_memory']['perplexity']:.2f}",
                    f"{row['memory_on_top']['value']:+.1%}",
                )
            Console().print(table)


if __name__ == "__main__":
    sys.exit(main())
