"""What training our own model takes on several GPUs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from memorizing.benchmark.step import count_step_flops
from memorizing.config import Config, TrainingConfig
from memorizing.errors import ConfigError
from memorizing.memory import memory_bytes
from memorizing.settings import AboveZero, NotNegative, Positive, check_types
from memorizing.training.resources import (
    Needs,
    count_weights,
    deal_training,
    estimate_needs,
)

_GATHERS_AND_SUMS = 3
"""Times that weights in parts go over the network for every part of a batch: put together for the
forward and the backward pass, and the gradients."""
_OF_MUON = 2
"""Times that they go over it once more in a step: matrices whole to some GPU, and back."""
_OF_WHOLE = 2
"""Times that the gradients of whole weights do: summed, and dealt."""


@dataclass(frozen=True)
class TrainingHardware:
    """What GPUs are taken to be. What they reach is measured, with a run."""

    gpu_gib: AboveZero = 80.0
    """Memory of a GPU."""
    tflops: AboveZero = 400.0
    """10^12 operations a second that a GPU reaches in the products of a step."""
    search_tflops: AboveZero = 200.0
    """The same in the search: the product of queries and keys, and the choice among the scores."""
    lookup_us: NotNegative = 0.0
    """Microseconds that a query adds whatever the capacity: choice, and attention to neighbors."""
    network_gb_s: AboveZero = 50.0
    """10^9 bytes a second that a GPU receives from the others."""
    gpus_per_machine: Positive = 8

    def __post_init__(self) -> None:
        """Refuse what no machine is."""
        check_types(self, "hardware")


def plan_training(
    config: Config,
    num_gpus: int,
    hardware: TrainingHardware | None = None,
    *,
    bytes_per_value: int = 2,
) -> dict[str, Any]:
    """Plan a training on GPUs, a process on each.

    Settings that save memory are tried from the cheapest to the dearest, and the first with which
    a process fits is taken. Of a step, the forward and backward pass and the search count, and what
    goes over the network, one after another; not the optimizer, softmax, norms or launches.

    Args:
        config: of the training; its rows are those of all GPUs.
        num_gpus: processes.
        hardware: what they run on; None is the defaults.
        bytes_per_value: of activations: 2 for bf16, 4 for fp32.

    Returns:
        `ways`, each with its `settings` and `bytes` of a process by what they are for, of which
        `chosen` is the number of the one that fits, or None; `least_gpus` that any way fits on, or
        None; bytes of a `memory` entry, a row and all rows, and the capacity that fits; per step
        and GPU `operations` and bytes of `communication`; `seconds` of a step; `tokens_per_s` of
        all GPUs.

    Raises:
        ConfigError: more GPUs than rows, or none.
    """
    hardware = TrainingHardware() if hardware is None else hardware
    model, training = config.model, config.training
    if not 1 <= num_gpus <= training.rows:
        raise ConfigError(
            f"there are {num_gpus} GPUs and {training.rows} rows; give one GPU at least, and at "
            "most one for each row"
        )
    num_weights = count_weights(model)

    def estimate(way: TrainingConfig, gpus: int) -> Needs:
        dealt = deal_training(way, -(-way.rows // gpus))
        return estimate_needs(model, dealt, num_weights, bytes_per_value, "cuda", gpus)

    def fits(needs: Needs) -> bool:
        return needs.total <= hardware.gpu_gib * 2**30

    ways = [
        {"settings": settings, "bytes": {**asdict(needs), "all": needs.total}, "fits": fits(needs)}
        for settings, way in list_ways(training, num_gpus)
        for needs in [estimate(way, num_gpus)]
    ]
    chosen = next((number for number, way in enumerate(ways) if way["fits"]), None)
    least = next(
        (
            gpus
            for gpus in range(1, training.rows + 1)
            if any(fits(estimate(way, gpus)) for _, way in list_ways(training, gpus))
        ),
        None,
    )
    _, way = list(list_ways(training, num_gpus))[-1 if chosen is None else chosen]
    dealt = deal_training(way, -(-way.rows // num_gpus))
    num_tokens = dealt.rows * model.segment_len
    computed = dealt.rows * count_step_flops(model) * (4 / 3 if way.gradient_checkpointing else 1)
    lookups = num_tokens * model.num_heads * len(model.memory_layers) if model.has_memory else 0
    lookups *= 2 if way.gradient_checkpointing else 1
    searched = 2 * lookups * model.head_dim * model.capacity
    others = (num_gpus - 1) / num_gpus
    exchanges = _OF_WHOLE
    if way.shard:
        exchanges = _GATHERS_AND_SUMS * dealt.accumulation
        exchanges += _OF_MUON if way.optimizer == "muon" else 0
    received = exchanges * others * 4 * num_weights
    seconds = {
        "model": computed / (hardware.tflops * 1e12),
        "search": searched / (hardware.search_tflops * 1e12) + lookups * hardware.lookup_us / 1e6,
        "communication": received / (hardware.network_gb_s * 1e9),
    }
    seconds["all"] = sum(seconds.values())
    needs = estimate(way, num_gpus)
    left = max(0, int(hardware.gpu_gib * 2**30) - needs.total + needs.memories)
    one_entry = memory_bytes(model, 1, 1)
    one_row = memory_bytes(model, 1, model.capacity)
    return {
        "kind": "training",
        "rows": training.rows,
        "capacity": model.capacity,
        "gpus": num_gpus,
        "machines": -(-num_gpus // hardware.gpus_per_machine),
        "num_weights": num_weights,
        "tokens_per_step": training.rows * model.segment_len,
        "memory": {
            "bytes_per_entry": one_entry,
            "bytes_per_row": one_row,
            "bytes": one_row * training.rows,
            "most_capacity": left // (dealt.rows * one_entry) if one_entry else None,
        },
        "ways": ways,
        "chosen": chosen,
        "least_gpus": least,
        "operations": {"model": computed, "search": searched, "search_share": searched / computed},
        "communication": {"bytes": received, "exchanges": exchanges},
        "seconds": seconds,
        "tokens_per_s": training.rows * model.segment_len / seconds["all"],
        "hardware": asdict(hardware),
    }


def list_ways(
    training: TrainingConfig, num_gpus: int
) -> Iterator[tuple[Mapping[str, Any], TrainingConfig]]:
    """Settings that save memory, the cheapest first, and the training with them."""
    one_by_one = {"accumulation": training.rows}
    less = {"gradient_checkpointing": True}
    # Adafactor's factors are of whole matrices.
    parts = {"shard": True, **({"optimizer": "adamw"} if training.optimizer == "adafactor" else {})}
    candidates = [{}, one_by_one, less, one_by_one | less]
    is_divisible = training.rows % num_gpus == 0 and not training.crossbatch_segments
    if num_gpus > 1 and is_divisible:
        candidates += [parts, parts | less, parts | one_by_one, parts | one_by_one | less]
    seen: list[TrainingConfig] = []
    for candidate in candidates:
        way = replace(training, **candidate)
        dealt = deal_training(way, -(-way.rows // num_gpus))
        if dealt not in seen:
            seen.append(dealt)
            changed = {k: v for k, v in candidate.items() if getattr(training, k) != v}
            yield {f"training.{key}": value for key, value in changed.items()}, way
