"""The module that `add_memory` puts on an attention layer."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from memorizing.huggingface.families import Decoder, rotate, rotate_back
from memorizing.huggingface.memory_head import MemoryHead, sum_local_scores
from memorizing.huggingface.memory_settings import MemorySettings
from memorizing.huggingface.step import Step


class EntriesRead(Exception):
    """A call that only reads has all entries: nothing above the last memory layer is needed."""


class MemoryLayer(MemoryHead):
    """Gates of one layer, and how its queries and keys become free of positions.

    Only the gates are parameters. `rotation` and `step` are those of the call that is running.
    """

    def __init__(
        self,
        decoder: Decoder,
        layer: int,
        settings: MemorySettings,
        num_heads: int,
        num_key_heads: int,
    ) -> None:
        """Make the gates of a layer."""
        super().__init__(
            num_heads, settings.bias, settings.temperature, joint=settings.combine == "joint"
        )
        self.layer = layer
        self.settings = settings
        self.step: Step | None = None
        self.rotation: tuple[Tensor, Tensor] | None = None
        self.is_rotated = decoder.is_rotated(layer)
        self.key_norm: Tensor
        # What unit keys are multiplied by; 0: keys are stored as they are.
        self.register_buffer("key_norm", torch.zeros(num_key_heads), persistent=True)
        self.seen_from: tuple[Tensor, Tensor] | None = None
        if self.is_rotated and settings.distance:
            position = torch.tensor([settings.distance])
            parameter = next(decoder.base.parameters())
            self.seen_from = decoder.look_up_rotation(layer, position, parameter)

    def take_rotation(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        """Hook before the attention module: cosines and sines of the call's positions."""
        given = kwargs.get("position_embeddings")
        if given is None:
            given = next((a for a in args if isinstance(a, tuple) and len(a) == 2), None)
        self.rotation = given

    def add(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        scaling: float | None,
        kwargs: dict[str, Any],
        output: Tensor,
    ) -> Tensor:
        """Local attention's `output` (B, T, H, D), with what the memory has for it.

        Args:
            module: the attention layer.
            query: (B, H, T, D), rotated.
            key: (B, H_kv, S, D), rotated; the last T are of this call.
            value: (B, H_kv, S, D).
            mask: of local attention.
            scaling: of the scores; None is 1 / sqrt(D).
            kwargs: what else attention is given.
            output: of local attention.

        Raises:
            EntriesRead: nothing more of this call is needed.
        """
        step = self.step
        if step is None:
            return output
        num_new = query.shape[2]
        softcap = kwargs.get("softcap")
        scaling = 1.0 / math.sqrt(query.shape[-1]) if scaling is None else scaling
        free_query = self.free(module, query)
        free_key = self.free(module, key[:, :, -num_new:].detach())
        if self.seen_from is not None:
            free_query = rotate(module, free_query, self._match(self.seen_from, query))
        if self.settings.search == "normalized":
            norms = self.key_norm.to(free_key).view(-1, 1, 1)
            free_key = nn.functional.normalize(free_key, dim=-1) * norms
        new_value = value[:, :, -num_new:]
        if step.collected is not None:
            step.collected[self.layer] = (free_key.detach(), new_value.detach())
            if self.layer == max(step.history.states):
                raise EntriesRead
        result = step.run_layer(
            self.layer, self, self.settings, free_query, free_key, new_value, scaling, softcap
        )
        if result is None:
            return output
        memory, memory_sum, found = result
        local = output.transpose(1, 2)
        local_sum = memory_sum
        if self.joint:
            local_sum = sum_local_scores(query, key, mask, scaling, softcap)
        return self.mix(local, memory, found, memory_sum, local_sum).transpose(1, 2)

    def free(self, module: nn.Module, x: Tensor) -> Tensor:
        """Queries or keys (B, H, T, D) of this call, their positions undone."""
        if not self.is_rotated or self.rotation is None:
            return x
        return rotate_back(module, x, self.rotation)

    @staticmethod
    def _match(rotation: tuple[Tensor, Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
        cos, sin = (part.to(x.device, x.dtype) for part in rotation)
        return cos, sin
