"""How much memory training will need, and whether the machine has it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import psutil
import torch

from memorizing.config import ModelConfig, TrainingConfig
from memorizing.errors import ResourceError
from memorizing.memory import memory_bytes
from memorizing.model import MemorizingTransformer
from memorizing.model.attention import choose_block_len
from memorizing.ranks import Ranks

_STATE_PER_WEIGHT = {"adafactor": 4, "adamw": 8, "muon": 8}
"""Bytes of optimizer state per weight: one or two fp32 moments (Muon is rounded up)."""


@dataclass(frozen=True)
class Needs:
    """An estimate of what training takes at its peak, in bytes."""

    weights: int
    """Weights, gradients and optimizer state."""
    activations: int
    """What the backward pass of one accumulation part keeps, roughly."""
    memories: int
    """The external memories, full."""
    caches: int = 0
    """Transformer-XL caches of all layers."""

    @property
    def total(self) -> int:
        """All of it."""
        return self.weights + self.activations + self.memories + self.caches


def count_weights(model: ModelConfig) -> int:
    """Parameters of a model, from those of its kinds of layers: nothing is allocated.

    Raises:
        ResourceError: sizes that no machine can have.
    """

    def count(num_layers: int, *memory_layers: int) -> int:
        shape = replace(model, num_layers=num_layers, memory_layers=memory_layers)
        with torch.device("meta"):
            return sum(p.numel() for p in MemorizingTransformer(shape).parameters())

    try:
        one, two, with_memory = count(1), count(2), count(1, 0)
    except (ArithmeticError, RuntimeError, TypeError) as error:
        raise ResourceError(
            f"a model with these sizes fits into no machine ({error}); lower those of [model]"
        ) from error
    more = (two - one) * (model.num_layers - 1)
    return one + more + (with_memory - one) * len(set(model.memory_layers))


def estimate_needs(
    model: ModelConfig,
    training: TrainingConfig,
    num_weights: int,
    bytes_per_value: int = 4,
    device: torch.device | str = "cpu",
    num_ranks: int = 1,
) -> Needs:
    """Estimate the bytes that training takes, of one process.

    One with weights in parts has its part, and whole, one after another, a layer that computes, the
    next one and a gradient; the embedding and its gradient are whole all the time.

    Args:
        model: the model's shape.
        training: batch, accumulation, optimizer; the rows are those of the process.
        num_weights: parameters of the model.
        bytes_per_value: of activations: 4 for fp32, 2 for bf16.
        device: where training is.
        num_ranks: processes, among which `training.shard` divides weights.
    """
    device = torch.device(device)
    weights = num_weights * (8 + _STATE_PER_WEIGHT[training.optimizer])
    if training.shard and num_ranks > 1:
        embedding = model.vocab_size * model.model_dim
        layer = (num_weights - embedding) // model.num_layers
        weights = weights // num_ranks + 8 * embedding + 12 * layer
    inner = model.num_heads * model.head_dim
    num_segments = 1 + training.crossbatch_segments
    tokens = training.rows // training.accumulation * model.segment_len * num_segments
    # Blocks of queries, each with the keys in its window.
    num_keys = min(
        model.window + choose_block_len(model.window, device),
        model.segment_len + (model.window if model.xl_cache else 0),
    )
    scores = tokens * model.num_heads * num_keys
    # Residual stream and norms, queries to output in raw and normalized form, both sides of the
    # ReLU, softmax weights; the backward pass of one layer has some tensors like these again.
    layer = tokens * (5 * model.model_dim + 10 * inner + 3 * model.ffn_dim) + scores
    num_kept = 1 if training.gradient_checkpointing else model.num_layers
    activations = layer * num_kept + 2 * scores + tokens * model.model_dim * model.num_layers
    if model.has_memory:
        computes_in = "bfloat16" if bytes_per_value == 2 else "float32"
        # Entries are read in place; in another dtype or on a GPU they are copied and converted.
        in_place = device.type == "cpu" and model.memory_dtype == computes_in
        per_neighbor = 8 * model.num_heads if in_place else 4 * inner
        # Crossbatch: softmax weights over the segments before, half of them on average.
        exposed = training.crossbatch_segments * model.segment_len * training.crossbatch_rows // 2
        per_token = model.num_neighbors * per_neighbor + 4 * exposed * model.num_heads
        activations += len(model.memory_layers) * tokens * per_token
    activations += tokens * model.vocab_size * 2  # logits and their gradient
    cached = training.rows * model.window * 2 * inner * model.num_layers if model.xl_cache else 0
    memories = memory_bytes(model, training.rows, model.capacity)
    return Needs(weights, activations * bytes_per_value, memories, cached * bytes_per_value)


def deal_training(training: TrainingConfig, num_rows: int) -> TrainingConfig:
    """The training as a process with some of its rows does it: as many at once as one would."""
    num_parts = max(num_rows * training.accumulation // training.rows, 1)
    return replace(training, rows=num_rows, accumulation=num_parts)


def check_resources(
    needs: Needs, model: ModelConfig, training: TrainingConfig, available: int
) -> None:
    """Refuse a run that cannot fit.

    Raises:
        ResourceError: with what is needed, for which capacity and batch, what there is, and what to
            lower.
    """
    if needs.total <= available:
        return
    lower = ["training.rows", "model.capacity"] if model.has_memory else ["training.rows"]
    if needs.activations > needs.memories and training.accumulation < training.rows:
        lower.insert(0, "the part of a batch done at once (raise training.accumulation)")
    raise ResourceError(
        f"training needs about {_gib(needs.total)} and {_gib(available)} are free: "
        f"{_gib(needs.weights)} for weights, gradients and optimizer, {_gib(needs.activations)} "
        f"for activations, {_gib(needs.memories)} for memories of capacity {model.capacity:,} in "
        f"{training.rows:,} rows, {_gib(needs.caches)} for caches; lower {', or '.join(lower)}"
    )


def measure_available(device: torch.device | str = "cpu") -> int:
    """Bytes free on the GPU, or on the machine and under the limits of this process's group."""
    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    available = psutil.virtual_memory().available
    limits = map(_read_control_group, _find_control_groups())
    return min([available, *(limit for limit in limits if limit is not None)])


def measure_share(device: torch.device, ranks: Ranks) -> int:
    """Bytes free for this process, where those of one machine divide its memory."""
    available = measure_available(device)
    return available // ranks.num_here if device.type == "cpu" else available


def _find_control_groups() -> list[Path]:
    """Folders of this process's control group (version 2) and those above; none elsewhere."""
    root = Path("/sys/fs/cgroup")
    try:
        lines = Path("/proc/self/cgroup").read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
    own = [root / line.removeprefix("0::/") for line in lines if line.startswith("0::/")]
    above = [folder for name in own for folder in (name, *name.parents)]
    return [folder for folder in above if folder.is_relative_to(root)]


def _read_control_group(folder: Path) -> int | None:
    """Bytes left under a group's limit, droppable file cache included; None without a limit."""
    try:
        limit = (folder / "memory.max").read_text(encoding="utf-8").strip()
        if limit == "max":
            return None
        used = int((folder / "memory.current").read_text(encoding="utf-8"))
        stat = dict(
            line.split()
            for line in (folder / "memory.stat").read_text(encoding="utf-8").splitlines()
        )
        return max(0, int(limit) - used + int(stat["inactive_file"]))
    except (OSError, ValueError, KeyError):
        return None


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:,.1f} GiB"
