"""What a memory of an existing model takes that is served in shards, and what a token asks."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from memorizing.errors import ConfigError
from memorizing.huggingface.attaching.attachment import check_heads, check_layers
from memorizing.huggingface.attaching.memory_settings import MemorySettings
from memorizing.huggingface.attaching.passages import LAST
from memorizing.huggingface.loading import describe_shape
from memorizing.memory.disk import FolderDescription
from memorizing.settings import AboveZero, NotNegative, check_types

_TEXT_BYTES = 4 + 8
"""Of a kept token: its characters, of which there are about four, and where they begin and end."""
_FOUND_BYTES = 21
"""Of what was found, besides its key and value: score, slot, two lines and whether it is there."""
_ROUNDS = 4
"""Of a question for passages: words, sums, spans, and what stands there."""
_PASSAGE_BYTES = 9
"""Of an entry in memory beside its key and value, where passages are found: the length of its
value, its token, and whether it is a sink."""


@dataclass(frozen=True)
class ServingHardware:
    """What machines are taken to be.

    Times by default are those of one core of Zen 4, which multiplies bf16, and of Ray on one
    machine; see docs/scaling.md.
    """

    machine_gib: AboveZero = 256.0
    """Memory of a machine."""
    search_gb_s: AboveZero = 4.7
    """10^9 bytes of keys that a shard's exact search reads in a second."""
    search_ms: NotNegative = 1.3
    """Of a search of any size: what is not the reading of keys."""
    network_gb_s: AboveZero = 1.0
    """10^9 bytes a second that whoever asks receives."""
    round_ms: NotNegative = 0.6
    """Of a round of questions to no shard at all."""
    shard_ms: NotNegative = 0.4
    """That each shard adds to a round, for whoever asks: what it sends and takes."""
    process_gib: NotNegative = 0.4
    """A shard's process without entries."""

    def __post_init__(self) -> None:
        """Refuse what no machine is."""
        check_types(self, "hardware")


def plan_serving(
    name: str,
    num_entries: int,
    num_shards: int,
    hardware: ServingHardware | None = None,
    *,
    num_replicas: int = 1,
    within_ms: float = 100.0,
    heads: Mapping[int, Sequence[int]] | None = None,
    **settings: Any,
) -> dict[str, Any]:
    """Plan a memory of so many entries, a token of text each, served in shards.

    Exact search; an index reads fewer keys, and what it keeps is beside them.

    Args:
        name: a folder of a model, of which its config is read, or a name on the hub.
        num_entries: in each layer that is kept.
        num_shards: processes that have a part each.
        hardware: what they run on; None is the defaults.
        num_replicas: processes that have the same part.
        within_ms: what a round should take, for the number of shards that reaches it.
        heads: per layer, those of queries that search; all do in others, or those of `settings`.
        settings: of the memory; see `MemorySettings`.

    Returns:
        What searches, as `heads`, None is all. Bytes of the model's `weights`, its `cache`, an
        entry, the `folder`, a `shard`; the `machines`, None where none holds a shard; per search
        `operations`, and the model's for the tokens that it serves, bytes and milliseconds;
        `shards_within` the time, or None where no number of them reaches it.

    Raises:
        ConfigError: no such model, a setting that cannot work, or a number below 1.
    """
    hardware = ServingHardware() if hardware is None else hardware
    if min(num_entries, num_shards, num_replicas) < 1 or num_shards > num_entries:
        raise ConfigError(
            f"there are {num_entries:,} entries, {num_shards:,} shards and {num_replicas:,} "
            "replicas; allowed: 1 or more of each, and not more shards than entries"
        )
    config, num_weights = describe_shape(name)
    text = config.get_text_config()
    num_layers, num_heads = text.num_hidden_layers, text.num_attention_heads
    key_heads = getattr(text, "num_key_value_heads", None) or num_heads
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // num_heads
    heads = heads or {}
    layers = tuple(settings.pop("layers", None) or heads or [num_layers * 3 // 5])
    memory = MemorySettings(tuple(sorted(layers)), **settings)
    check_layers(memory.layers, num_layers)
    check_heads(heads, memory.layers, num_heads)
    chosen = {layer: heads.get(layer, range(num_heads)) for layer in memory.layers}
    num_groups = num_heads // key_heads
    num_keys = sum(len({head // num_groups for head in one}) for one in chosen.values())
    item_bytes = getattr(torch, memory.dtype).itemsize
    vector_bytes = head_dim * item_bytes

    weight_bytes = getattr(config.dtype, "itemsize", 4)
    kept = FolderDescription(
        "plan", memory.list_kept(num_layers), key_heads, head_dim, memory.dtype
    ).bytes_per_entry
    has_text = memory.finds_passages and memory.keep == "text"
    folder = num_entries * (kept + 4 + (_TEXT_BYTES if has_text else 0))
    per_shard = math.ceil(num_entries / num_shards)
    shard = 2 * num_keys * vector_bytes + (_PASSAGE_BYTES if memory.finds_passages else 0)
    places = memory.window + memory.num_sinks + memory.room_len

    # Entries are asked for with every token; passages once in a while, by several queries.
    is_seldom = memory.read == "passages"
    num_tokens, num_queries = (memory.search_every, LAST) if is_seldom else (1, 1)
    num_asking = sum(map(len, chosen.values()))
    operations = {
        "tokens": num_tokens,
        "model": 2 * num_weights * num_tokens,
        "search": 2 * num_queries * num_asking * head_dim * num_entries,
    }
    found = num_asking * memory.num_neighbors * (2 * vector_bytes + _FOUND_BYTES)
    if is_seldom:
        found = num_queries * num_asking * 8 + memory.num_passages * memory.passage_len * 4
    received = num_shards * found
    num_rounds = _ROUNDS if is_seldom else len(memory.layers)
    scanned_ms = num_keys * vector_bytes / hardware.search_gb_s / 1e6
    network_ms = received / hardware.network_gb_s / 1e6

    def take(shards: int) -> dict[str, float]:
        times = {
            "search": len(memory.layers) * hardware.search_ms
            + scanned_ms * math.ceil(num_entries / shards),
            "asking": num_rounds * (hardware.round_ms + shards * hardware.shard_ms),
            "network": network_ms * shards / num_shards,
        }
        return {**times, "all": sum(times.values())}

    candidates = [2**power for power in range(21) if 2**power <= num_entries]
    num_processes = num_shards * num_replicas
    process = hardware.process_gib * 2**30 + per_shard * shard
    per_machine = int(hardware.machine_gib * 2**30 // process)
    return {
        "kind": "serving",
        "model": name,
        "num_weights": num_weights,
        "entries": num_entries,
        "shards": num_shards,
        "replicas": num_replicas,
        "settings": memory.to_dict(),
        "heads": {layer: list(one) for layer, one in heads.items()} or None,
        "bytes": {
            "weights": num_weights * weight_bytes,
            "cache": 2 * num_layers * places * key_heads * head_dim * weight_bytes,
            "entry": kept,
            "folder": folder,
            "shard": int(process),
            "all_shards": int(process) * num_processes,
        },
        "machines": math.ceil(num_processes / per_machine) if per_machine else None,
        "operations": {**operations, "search_share": operations["search"] / operations["model"]},
        "received_bytes": received,
        "rounds": num_rounds,
        "ms": take(num_shards),
        "within_ms": within_ms,
        "shards_within": next((n for n in candidates if take(n)["all"] <= within_ms), None),
        "hardware": asdict(hardware),
    }
