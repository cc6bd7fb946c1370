"""Which weights are trained, and copies of them in fp32 where the model has fewer bits."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import torch
from torch import Tensor, nn

from memorizing.errors import ConfigError
from memorizing.huggingface.attaching.attachment import Attachment
from memorizing.huggingface.learning.adapter import add_lora, find_lora, list_parameters, train_only
from memorizing.training.finetuning.settings import FinetuneSettings
from memorizing.training.optimizer import ParameterGroups, group_parameters


def prepare_weights(inner: Any, attachment: Attachment, settings: FinetuneSettings) -> None:
    """Add LoRA where it is wanted and missing, and say which parameters are trained. In place.

    Raises:
        ConfigError: nothing would be trained, or LoRA is in the way.
    """
    lora = find_lora(inner)
    if settings.train == "gates" and not attachment.settings.capacity:
        raise ConfigError(
            "capacity is 0 and train is 'gates': gates of no memory learn nothing; train LoRA "
            "or all weights, or give a capacity"
        )
    if settings.train == "gates" and not any(
        heads.is_any for heads in attachment.open_heads.values()
    ):
        raise ConfigError(
            "train is 'gates' and all heads are closed: closed gates learn nothing; open some "
            "(add_memory(model, heads=...), or a bias above -29)"
        )
    if settings.train == "all" and lora is not None:
        raise ConfigError(
            "train is 'all' and the model has LoRA; merge it into the weights first, or train LoRA"
        )
    if settings.train == "lora" and lora is None:
        first = min(attachment.settings.layers) if settings.lora_layers == "from_memory" else 0
        add_lora(
            inner,
            rank=settings.lora_rank,
            alpha=settings.lora_alpha,
            dropout=settings.lora_dropout,
            first_layer=first,
        )
    train_only(
        inner,
        memory=attachment.settings.capacity > 0,
        lora=settings.train == "lora",
        others=settings.train == "all",
    )


class TrainedWeights:
    """Trainable parameters by group; those in bf16 or fp16 have a copy in fp32 that is updated.

    A step is often too small for bf16 to show it: without the copy it would be lost.
    """

    def __init__(self, inner: Any, attachment: Attachment) -> None:
        """Take the parameters that require a gradient."""
        embeddings = [inner.get_input_embeddings().weight]
        output = inner.get_output_embeddings()
        embeddings += [output.weight] if output is not None else []
        found = group_parameters(inner, embeddings, list_parameters(attachment))
        self._pairs: list[tuple[nn.Parameter, nn.Parameter]] = []
        self.groups = ParameterGroups(
            **{
                field.name: {
                    name: self._take(parameter)
                    for name, parameter in getattr(found, field.name).items()
                }
                for field in fields(ParameterGroups)
            }
        )

    def _take(self, parameter: nn.Parameter) -> nn.Parameter:
        if parameter.dtype == torch.float32:
            return parameter
        copy = nn.Parameter(parameter.detach().float())
        self._pairs.append((parameter, copy))
        return copy

    @property
    def num_weights(self) -> int:
        """Numbers that are trained."""
        groups = (getattr(self.groups, field.name) for field in fields(ParameterGroups))
        return sum(p.numel() for group in groups for p in group.values())

    def find_exact(self, parameter: Tensor) -> Tensor:
        """The copy of a parameter in fp32, or the parameter itself where it has none."""
        return next((copy for mine, copy in self._pairs if mine is parameter), parameter)

    def take_gradients(self) -> None:
        """Move the gradients of the model's parameters to the copies. In place."""
        for parameter, copy in self._pairs:
            copy.grad = None if parameter.grad is None else parameter.grad.float()
            parameter.grad = None

    def give_back(self) -> None:
        """Round the copies into the model. In place."""
        with torch.no_grad():
            for parameter, copy in self._pairs:
                parameter.copy_(copy)

    def zero_grad(self) -> None:
        """Drop the gradients of the model's parameters."""
        for parameter, _ in self._pairs:
            parameter.grad = None
