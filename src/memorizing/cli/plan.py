"""`memorizing plan`."""

from __future__ import annotations

from typing import Annotated, Any

from memorizing.cli.options import (
    HeadsOption,
    JsonOption,
    LayersOption,
    option,
    parse_settings,
    prepare_files,
    set_option,
    write_result,
)
from memorizing.cli.read import read_settings
from memorizing.errors import ConfigError
from memorizing.terminal import make_console, show

EXAMPLES = """\b
examples:
  memorizing plan --model paper_8b --capacity 262144 --rows 256 --gpus 64
  memorizing plan --model paper_200m --gpus 8 --hardware tflops=250
  memorizing plan --hub runs/smollm2 --entries 1e9 --shards 32
  memorizing plan --hub runs/smollm2 --entries 1e8 --set read=entries --json plan.json
"""


def run(
    model: Annotated[
        str | None, option("RECIPE", "Train this: a recipe by name or file.", "--model")
    ] = None,
    hub: Annotated[
        str | None,
        option("MODEL", "Serve a memory of this: a folder, or a name on the hub.", "--hub"),
    ] = None,
    capacity: Annotated[
        int | None, option("N", "Entries of a row's memory.  [default: the recipe's]", min=0)
    ] = None,
    rows: Annotated[
        int | None, option("N", "Rows of all GPUs.  [default: the recipe's]", min=1)
    ] = None,
    gpus: Annotated[int, option("N", "GPUs to train on.", min=1)] = 1,
    entries: Annotated[
        str | None, option("N", "Entries to serve, a token of text each: 1000000, or 1e6.")
    ] = None,
    shards: Annotated[int, option("N", "Processes that have a part of them each.", min=1)] = 1,
    replicas: Annotated[int, option("N", "Processes that have the same part.", min=1)] = 1,
    within_ms: Annotated[
        float, option("MS", "What a search should take, for the shards that it needs.", min=0.1)
    ] = 100.0,
    layers: LayersOption = None,
    heads: HeadsOption = None,
    settings: Annotated[
        list[str] | None,
        set_option("Of the recipe, as training.shard=true, or of the memory, as read=entries."),
    ] = None,
    hardware: Annotated[
        list[str] | None,
        option(
            "KEY=VALUE",
            "What the machines are, as gpu_gib=141; the result names all. Repeatable.",
            "--hardware",
        ),
    ] = None,
    json_file: JsonOption = None,
) -> None:
    """What a training, or a memory that is served, takes: bytes, operations, time, machines.

    Nothing is loaded or started. Times follow from how fast the machines are said to be.
    """
    if (model is None) == (hub is None):
        raise ConfigError("plan what? Give --model RECIPE to train, or --hub MODEL to serve")
    foreign: dict[str, Any] = {"--entries": entries, "--layers": layers, "--heads": heads}
    if hub:
        foreign = {"--capacity": capacity, "--rows": rows}
    for name, value in foreign.items():
        if value is not None:
            wanted = "--model" if hub else "--hub"
            raise ConfigError(f"{name} is {value}; it goes with {wanted}, which is not given")
    given = parse_settings(hardware, "KEY=VALUE with what a machine is, such as tflops=250")
    prepare_files(json_file)
    if model is not None:
        result = _plan_training(model, capacity, rows, gpus, settings, given)
    else:
        assert hub is not None
        count = parse_count(entries)
        wanted = read_settings(layers, heads, None, settings)
        result = _plan_serving(hub, count, shards, replicas, within_ms, wanted, given)
    write_result(json_file, result)


def _plan_training(
    recipe: str,
    capacity: int | None,
    rows: int | None,
    gpus: int,
    settings: list[str] | None,
    hardware: dict[str, Any],
) -> dict[str, Any]:
    from memorizing.config import load_config

    changes = list(settings or [])
    changes += [] if capacity is None else [f"model.capacity={capacity}"]
    changes += [] if rows is None else [f"training.rows={rows}"]
    config = load_config(recipe).replace(changes)

    from memorizing.planning import TrainingHardware, plan_training
    from memorizing.settings import build_dataclass

    machines = build_dataclass(TrainingHardware, hardware, "hardware.")
    precision = config.training.precision
    result = plan_training(config, gpus, machines, bytes_per_value=4 if precision == "fp32" else 2)
    result = {"recipe": recipe, **result}
    print_training(result)
    return result


def _plan_serving(
    hub: str,
    entries: int,
    shards: int,
    replicas: int,
    within_ms: float,
    settings: dict[str, Any],
    hardware: dict[str, Any],
) -> dict[str, Any]:
    from memorizing.planning import ServingHardware, plan_serving
    from memorizing.settings import build_dataclass

    result = plan_serving(
        hub,
        entries,
        shards,
        build_dataclass(ServingHardware, hardware, "hardware."),
        num_replicas=replicas,
        within_ms=within_ms,
        **settings,
    )
    print_serving(result)
    return result


def parse_count(text: str | None) -> int:
    """A whole number as 1000000, 1_000_000 or 1e6.

    Raises:
        ConfigError: anything else, or less than 1.
    """
    try:
        number = float((text or "").replace("_", ""))
        if number >= 1 and number == int(number):
            return int(number)
    except (ValueError, OverflowError):
        pass
    seen = "not given" if text is None else repr(text)
    raise ConfigError(f"--entries is {seen}; allowed: 1 or more, such as 1000000 or 1e6")


def print_training(result: dict[str, Any]) -> None:
    """Print ways to train, and what a step takes."""
    from rich.box import SIMPLE
    from rich.table import Table

    gib, way = 2**30, result["chosen"]
    memory, seconds = result["memory"], result["seconds"]
    show(
        f"{result['recipe']}: {result['num_weights']:,} weights, {result['rows']:,} rows, a memory "
        f"of {result['capacity']:,} entries each, on {result['gpus']:,} GPUs in "
        f"{result['machines']:,} machines"
    )
    # What each column adds up: all of it stays within 80 characters.
    kinds = {
        "weights": ["weights"],
        "activations": ["activations"],
        "memory": ["memories", "caches"],
        "all": ["all"],
    }
    table = Table(title="GiB of a GPU", title_justify="left", box=SIMPLE, padding=(0, 1))
    for name in ("with [training]", *kinds, ""):
        table.add_column(name, justify="right" if name in kinds else "left", no_wrap=True)
    for number, one in enumerate(result["ways"]):
        changes = "\n".join(
            key.partition(".")[2] + ("" if value is True else f"={_format(value)}")
            for key, value in one["settings"].items()
        )
        fits = "chosen" if number == way else "fits" if one["fits"] else ""
        numbers = [f"{sum(map(one['bytes'].get, keys)) / gib:,.1f}" for keys in kinds.values()]
        table.add_row(changes or "the recipe", *numbers, fits)
    make_console().print(table)
    size = result["hardware"]["gpu_gib"]
    if way is None:
        advice = [f"nothing of it fits into {size:g} GiB: lower rows or capacity"]
        if memory["most_capacity"]:
            advice.append(f"a capacity of {memory['most_capacity']:,} would fit with the last")
        if result["least_gpus"]:
            advice.append(f"{result['least_gpus']:,} GPUs would do")
        show("; ".join(advice))
    else:
        show(
            f"fits into {size:g} GiB, with capacities up to {memory['most_capacity']:,}; "
            f"{result['least_gpus']:,} GPUs are the fewest that any of these fits on"
            if memory["most_capacity"] is not None
            else f"fits into {size:g} GiB"
        )
    operations = result["operations"]
    show(
        f"memory: {memory['bytes_per_entry']:,} bytes an entry, "
        f"{memory['bytes_per_row'] / gib:,.2f} GiB a row, "
        f"{memory['bytes'] / gib:,.1f} GiB in all; it stays where its row is"
    )
    show(
        f"a step of a GPU: {operations['model'] / 1e12:,.2f} Tflop of the model, "
        f"{operations['search'] / 1e12:,.2f} of the search ({operations['search_share']:.1%}), "
        f"{result['communication']['bytes'] / 1e9:,.1f} GB received"
    )
    show(
        f"seconds: {seconds['model']:.3f} model + {seconds['search']:.3f} search + "
        f"{seconds['communication']:.3f} communication = {seconds['all']:.3f}; "
        f"{result['tokens_per_s']:,.0f} tokens a second"
    )
    _print_hardware(result)


def print_serving(result: dict[str, Any]) -> None:
    """Print what a memory and its shards take, and a search of them."""
    from rich.table import Table

    from memorizing.cli.pretrained import describe_bytes
    from memorizing.huggingface.attaching.attachment import describe_heads

    settings, sizes, ms = result["settings"], result["bytes"], result["ms"]
    searching = f"layers {', '.join(map(str, settings['layers']))}"
    if result["heads"]:
        searching = describe_heads(result["heads"])
    show(
        f"{result['model']}: {result['num_weights']:,} weights; {result['entries']:,} entries of "
        f"{searching}, read as {settings['read']}, in "
        f"{result['shards']:,} shards of {result['replicas']:,}"
    )
    table = Table(show_header=False)
    rows = {
        "weights of the model": "weights",
        "its window and passages": "cache",
        "an entry": "entry",
        "the folder": "folder",
        "a shard's process": "shard",
        "all of them": "all_shards",
    }
    for label, key in rows.items():
        table.add_row(label, describe_bytes(sizes[key]))
    make_console().print(table)
    size = result["hardware"]["machine_gib"]
    machines = result["machines"]
    show(
        f"a shard does not fit into {size:g} GiB: take more shards"
        if machines is None
        else f"machines of {size:g} GiB that hold them: {machines:,}"
    )
    operations = result["operations"]
    tokens = operations["tokens"]
    show(
        f"a search, once in {tokens} token{'s' * (tokens > 1)}: "
        f"{operations['search'] / 1e9:,.2f} Gflop, the model's {operations['model'] / 1e9:,.2f}; "
        f"{result['rounds']} round{'s' * (result['rounds'] > 1)}, "
        f"{result['received_bytes'] / 1e6:,.2f} MB received"
    )
    show(
        f"milliseconds: {ms['search']:,.1f} search + {ms['asking']:,.1f} asking + "
        f"{ms['network']:,.1f} network = {ms['all']:,.1f}"
    )
    within, limit = result["shards_within"], result["within_ms"]
    show(
        f"no number of shards searches all within {limit:g} ms: asking them takes longer; use an "
        "index (docs/how-to-choose-an-index.md)"
        if within is None
        else f"{within:,} shards on cores of their own search all within {limit:g} ms"
    )
    _print_hardware(result)


def _print_hardware(result: dict[str, Any]) -> None:
    values = ", ".join(f"{key}={_format(value)}" for key, value in result["hardware"].items())
    show(f"taken to be so (--hardware KEY=VALUE): {values}")


def _format(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:g}" if isinstance(value, float) else str(value)
