"""`memorizing info`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from memorizing.cli.options import JsonOption, prepare_files, write_result
from memorizing.errors import ConfigError
from memorizing.terminal import show

EXAMPLES = """\b
examples:
  memorizing info recipes
  memorizing info paper_200m
  memorizing info runs/small
  memorizing info indexes
  memorizing info machine --json machine.json
"""

TOPICS = ("recipes", "corpora", "indexes", "machine")


def run(
    what: Annotated[
        str,
        typer.Argument(
            metavar="[RUN|RECIPE|recipes|corpora|indexes|machine]",
            help="Folder of a run, a recipe by name or file, or one of the four lists.",
        ),
    ] = "recipes",
    json_file: JsonOption = None,
) -> None:
    """Describe a run, a recipe, what there is to train on or search with, or this machine."""
    prepare_files(json_file)
    values = describe(what)
    print_values(values)
    write_result(json_file, values)


def describe(what: str) -> dict[str, Any]:
    """What there is to say about a topic, a recipe or a run, as plain values.

    Raises:
        ConfigError: it is none of them, with the nearest name.
        RunFolderError: a folder that is not a run.
    """
    if what == "recipes":
        return describe_recipes()
    if what == "corpora":
        return describe_corpora()
    if what == "indexes":
        return describe_indexes()
    if what == "machine":
        from memorizing.training.run_folder import describe_machine

        return {name: value for name, value in describe_machine().items() if name != "command"}
    if Path(what).is_dir():
        return describe_run(Path(what))
    return describe_recipe(what)


def describe_recipes() -> dict[str, Any]:
    """Names and descriptions of the recipes that come with the package."""
    from memorizing.config import list_recipes, load_config

    return {name: load_config(name).description for name in list_recipes()}


def describe_corpora() -> dict[str, Any]:
    """How each kind of corpus is written, and what it is."""
    from memorizing.data import CORPUS_KINDS

    return {kind.usage: kind.summary for kind in CORPUS_KINDS.values()}


def describe_indexes() -> dict[str, Any]:
    """What each index is, its options with their defaults, and whether it can be used here."""
    import dataclasses
    import inspect

    from memorizing.errors import IndexUnavailableError
    from memorizing.index_settings import list_indexes, parse_index
    from memorizing.knn import make_index
    from memorizing.settings import format_value

    described = {}
    for name in list_indexes():
        settings = parse_index(name)
        options = [
            f"{field.name}={format_value(field.default)}" for field in dataclasses.fields(settings)
        ]
        try:
            make_index(settings)
            usable = "yes"
        except IndexUnavailableError as error:
            usable = str(error)
        summary = inspect.getdoc(type(settings)) or ""
        described[name] = {
            "what": summary.partition("\n")[0],
            "options": options,
            "installed": usable,
        }
    return described


def describe_recipe(recipe: str) -> dict[str, Any]:
    """Settings of a recipe, with what it takes to train it.

    Raises:
        ConfigError: no such recipe, topic or run folder.
    """
    from memorizing.config import list_recipes, load_config
    from memorizing.settings import describe_unknown

    is_file = recipe.endswith(".toml") or Path(recipe).is_file()
    if not is_file and recipe not in list_recipes():
        known = [*TOPICS, *list_recipes()]
        raise ConfigError(describe_unknown("topic, recipe or run folder", recipe, known))
    config = load_config(recipe)

    from memorizing.memory import memory_bytes
    from memorizing.training import count_weights, estimate_needs

    num_weights = count_weights(config.model)
    needs = estimate_needs(config.model, config.training, num_weights)
    one_row = memory_bytes(config.model, 1, config.model.capacity)
    return {
        **config.to_dict(),
        "takes": {
            "num_weights": num_weights,
            "tokens_per_step": config.training.rows * config.model.segment_len,
            "memory_mib_per_row": round(one_row / 2**20, 3),
            "training_gib": round(needs.total / 2**30, 3),
        },
    }


def describe_run(run_dir: Path) -> dict[str, Any]:
    """Settings of a run, its sessions, its last metrics and its checkpoints.

    Raises:
        RunFolderError: the folder is not a run.
    """
    from memorizing.training import list_checkpoints, read_metrics, read_run_config
    from memorizing.training.reporting import METRICS_FILE
    from memorizing.training.run_folder import read_sessions

    config = read_run_config(run_dir)
    metrics = run_dir / METRICS_FILE
    lines = read_metrics(metrics) if metrics.is_file() else []
    sessions = read_sessions(run_dir)
    return {
        **config.to_dict(),
        "checkpoints": [path.name for path in list_checkpoints(run_dir)],
        "last_metrics": lines[-1] if lines else None,
        **({"sessions": sessions} if sessions else {}),
    }


def print_values(values: dict[str, Any], indent: str = "") -> None:
    """Print nested values as aligned lines, tables indented below their name."""
    width = max(
        (len(key) for key, value in values.items() if not isinstance(value, dict)), default=0
    )
    for key, value in values.items():
        if isinstance(value, dict):
            show(f"{indent}{key}")
            print_values(value, indent + "  ")
        elif isinstance(value, list) and value and all(isinstance(one, dict) for one in value):
            for number, item in enumerate(value, start=1):
                show(f"{indent}{key} {number} of {len(value)}")
                print_values(item, indent + "  ")
        else:
            show(f"{indent}{key:<{width}}  {format_value(value)}".rstrip())


def format_value(value: Any) -> str:
    """A value as text: lists with commas, numbers with separators, nothing as a dash."""
    if isinstance(value, list):
        return ", ".join(map(format_value, value)) or "-"
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "-"}[value]
    return f"{value:,}" if isinstance(value, int) else str(value)
