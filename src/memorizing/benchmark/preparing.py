"""What every benchmark of a model with memory can be asked for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from importlib import metadata
from typing import Any

import torch
from torch import Tensor

from memorizing.config import ModelConfig, check_capacity
from memorizing.errors import ConfigError
from memorizing.knn import is_emulated
from memorizing.loss import sum_nats
from memorizing.memory import Memory
from memorizing.model import MemorizingTransformer, ModelState
from memorizing.model.block import normalize
from memorizing.training import run_folder

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
"""Precisions, by name."""

DEFAULT_PRECISION = "fp32" if is_emulated(torch.bfloat16) else "bf16"
"""bf16, but for processors on which torch emulates it."""


def check_arguments(
    config: ModelConfig, entries: Sequence[int], num_pairs: int, precision: str
) -> None:
    """Refuse what cannot be timed.

    Raises:
        ConfigError: no memory layer, no entries, a capacity that cannot be, no pair, or another
            precision than `bf16` and `fp32`.
    """
    if not config.memory_layers:
        raise ConfigError(
            "the model has no memory layer to time; choose a recipe with model.memory_layers"
        )
    if not entries or min(entries) < 1 or num_pairs < 1:
        raise ConfigError(
            f"entries are {list(entries)} and num_pairs is {num_pairs}; give at least one capacity "
            "above 0 (the model without memory is always timed) and at least one pair"
        )
    for capacity in entries:
        check_capacity(capacity, config.num_neighbors)
    if precision not in DTYPES:
        raise ConfigError(f"precision is {precision!r}; allowed: 'bf16' and 'fp32'")


_SEARCH_PACKAGES = ("faiss-cpu", "scann", "usearch")


def describe_machine() -> dict[str, Any]:
    """Processor, cores, threads, device, versions and commit, as plain values for JSON."""
    machine = run_folder.describe_machine()
    versions = {"memorizing": machine["memorizing"], "python": machine["python"]}
    versions |= machine["packages"]
    for name in _SEARCH_PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return {
        "processor": machine["processor"],
        "cores": machine["cores"],
        "threads": machine["threads"],
        "device": machine["device"],
        "system": machine["system"],
        "versions": versions,
        "commit": machine["commit"],
    }


def describe_benchmark(
    name: str, model: MemorizingTransformer, precision: str, index: str, num_pairs: int
) -> dict[str, Any]:
    """What every benchmark of a model says of itself and of the machine, as plain values."""
    return {
        "benchmark": name,
        "precision": precision,
        "index": index,
        "num_pairs": num_pairs,
        "segment_len": model.config.segment_len,
        "parameters": sum(weight.numel() for weight in model.parameters()),
        **describe_machine(),
    }


def summarize_machine(result: dict[str, Any]) -> str:
    """One sentence of what `describe_machine` put into a result, for the line below a table."""
    versions = result["versions"]
    named = [
        f"{name} {versions[name]}" for name in ("torch", *_SEARCH_PACKAGES) if name in versions
    ]
    # Files written before GPUs were named have none.
    device = result.get("device", "cpu")
    gpu = "" if device == "cpu" else f"{device}; "
    threads = f"{result['threads']} {'thread' if result['threads'] == 1 else 'threads'}"
    commit, _, changes = (result["commit"] or "unknown").partition(" ")
    return (
        f"{gpu}{result['processor']}, {result['cores']} cores, {threads}; "
        f"memorizing {versions['memorizing']}, {', '.join(named)}, Python {versions['python']}; "
        f"commit {' '.join([commit[:12], changes]).strip()}"
    )


_CHUNK_LEN = 8192
"""Entries appended at once."""


def fill_state(
    model: MemorizingTransformer,
    tokens: Tensor,
    capacity: int,
    index: str = "exact",
    keys: Tensor | None = None,
) -> ModelState:
    """A state of one row at the start of a segment, whose cache and memories are full.

    Args:
        model: read without gradient.
        tokens: (1, segment_len): read until the cache is full.
        capacity: of every memory; 0 is no memory.
        index: what searches the memories.
        keys: as in `fill_memory`.
    """
    state = model.init_state(1, capacity, index=index)
    with torch.no_grad():
        for _ in range(-(-model.config.window // model.config.segment_len)):
            state = model(tokens, state).state.commit()
    # The clock of a memory stands where its row stands: at the end of a segment.
    num_entries = -(-capacity // state.segment_len) * state.segment_len
    for memory in state.memories.values():
        fill_memory(memory, num_entries, keys)
    return replace(state, position=state.position + num_entries, generation=None)


def fill_memory(memory: Memory, num_entries: int, keys: Tensor | None = None) -> None:
    """Append entries of token 0: random values, and keys that are random and of length 1, or given.

    Changes the memory in place.

    Args:
        memory: of one row.
        num_entries: how many are appended.
        keys: (h, N, D), appended in their order, and from the first again after the last; fewer
            heads than the memory's are repeated.
    """
    _, num_heads, _, head_dim = memory.keys.shape
    for start in range(0, num_entries, _CHUNK_LEN):
        stop = min(start + _CHUNK_LEN, num_entries)
        shape = (1, num_heads, stop - start, head_dim)
        if keys is None:
            chunk = normalize(torch.randn(shape))
        else:
            chosen = keys[:, torch.arange(start, stop) % keys.shape[1]]
            chunk = chosen[torch.arange(num_heads) % keys.shape[0]].unsqueeze(0)
        memory.append(chunk, torch.randn(shape), tokens=make_first_tokens(memory, stop - start))


def make_first_tokens(memory: Memory, num_entries: int) -> Tensor | None:
    """Tokens (1, n) of as many entries, all 0, where a memory of one row keeps them."""
    if memory.tokens is None:
        return None
    return memory.tokens.new_zeros(1, num_entries)


def run_step(model: MemorizingTransformer, state: ModelState, tokens: Tensor) -> ModelState:
    """A training step without the optimizer: forward, loss, backward, commit.

    Args:
        model: gets gradients.
        state: at the start of a segment; its memories are written in place.
        tokens: (1, segment_len + 1): the segment, and the targets one token on.
    """
    output = model(tokens[:, :-1], state)
    targets = tokens[:, 1:]
    loss = sum_nats(output.logits, targets, torch.ones_like(targets, dtype=torch.bool))
    (loss / targets.numel()).backward()
    return output.state.commit()
