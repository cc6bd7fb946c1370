"""How a model of `transformers` is finetuned: one frozen dataclass, validated at construction."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from memorizing.config import TrainingConfig
from memorizing.errors import ConfigError
from memorizing.settings import (
    AboveZero,
    Count,
    NotNegative,
    Positive,
    Seed,
    Share,
    ShareBelowOne,
    check_types,
)

if TYPE_CHECKING:
    from memorizing.huggingface.attaching.memory_settings import MemorySettings

_RATES = {"gates": 1e-2, "lora": 3e-4, "all": 3e-5}


@dataclass(frozen=True)
class FinetuneSettings:
    """What is trained, on how much, and how fast."""

    train: Literal["gates", "lora", "all"] = "lora"
    """Gates and scales only; these and LoRA on attention and MLP; or these and all weights."""
    steps: Positive = 500
    rows: Positive = 2
    """Documents read side by side: a step reads a segment of each, and learns from all of them.
    Where passages are read, texts of a step."""
    learning_rate: NotNegative = 0.0
    """Of LoRA (0 means 3e-4) or of all weights (0 means 3e-5)."""
    gate_learning_rate: NotNegative = 1e-2
    """Of gates and scales: a group of their own, without weight decay."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """After warm-up."""
    warmup_steps: Count = 20
    final_share: Share = 0.1
    """`cosine` and `linear` end at this share of the rate."""
    weight_decay: NotNegative = 0.0
    clip_norm: NotNegative = 1.0
    """Gradient norm is clipped to this; 0 turns clipping off."""
    lora_rank: Positive = 16
    lora_alpha: AboveZero = 32.0
    """Updates are multiplied by lora_alpha / lora_rank."""
    lora_dropout: ShareBelowOne = 0.0
    lora_layers: Literal["all", "from_memory"] = "all"
    """Which layers have LoRA: all, or those from the first memory layer on."""
    seed: Seed = 0
    """Initialization of LoRA, order of documents, dropout."""
    min_document_tokens: Count = 0
    """Shorter documents are left out."""
    max_document_tokens: Count = 0
    """Longer documents are cut into several; 0 leaves them whole."""
    shard: bool = False
    """Of several processes each keeps a part of every matrix of the model (FSDP2); in one process
    nothing changes."""
    log_every: Positive = 10
    evaluate_every: Count = 100
    """Steps between evaluations on held-out documents, with memory and without; 0 is never."""
    evaluate_tokens: Positive = 32_768
    """Read in an evaluation, from the beginnings of held-out documents; passages count too."""
    checkpoint_every: Count = 100
    """Steps between checkpoints; the last step always has one. 0 is only the last."""
    keep_checkpoints: Positive = 2
    """How many of the latest checkpoints are kept; the best by evaluation is kept besides."""

    def __post_init__(self) -> None:
        """Refuse what cannot work."""
        check_types(self, "finetune")

    def check_memory(self, memory: MemorySettings) -> None:
        """Refuse gates that a memory does not have.

        Raises:
            ConfigError: with what to do.
        """
        if self.train == "gates" and memory.read == "passages":
            raise ConfigError(
                "train is 'gates' and read is 'passages', which all layers read without gates; "
                "train 'lora' or 'all', or read entries"
            )
        if self.train == "gates" and not memory.capacity:
            raise ConfigError(
                "capacity is 0 and train is 'gates': gates of no memory learn nothing; train LoRA "
                "or all weights, or give a capacity"
            )

    def make_training_config(self) -> TrainingConfig:
        """What the optimizer and its schedule need to know.

        Raises:
            ConfigError: a value that training refuses.
        """
        names = {field.name for field in dataclasses.fields(TrainingConfig)}
        shared = {name: value for name, value in self.to_dict().items() if name in names}
        shared["learning_rate"] = self.learning_rate or _RATES[self.train]
        return TrainingConfig(**shared)

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return dataclasses.asdict(self)
