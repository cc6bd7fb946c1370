"""The module that `add_memory` puts on an attention layer."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from memorizing.errors import ConfigError
from memorizing.huggingface.attaching.families import Decoder, rotate_back
from memorizing.huggingface.attaching.memory_head import Attended, MemoryHead, sum_local_scores
from memorizing.huggingface.attaching.memory_settings import MemorySettings
from memorizing.huggingface.attaching.open_heads import OpenHeads, plan_open_heads
from memorizing.huggingface.attaching.step import Step
from memorizing.index_settings import SealedSettings, parse_index


class EntriesRead(Exception):
    """A call that only reads has all entries: nothing above the last memory layer is needed."""


class MemoryLayer(MemoryHead):
    """Gates of one layer, and how its queries and keys become free of positions.

    Only the gates are parameters. With `search="normalized"` the buffer `key_norm` (H_kv,) is set,
    which unit keys are multiplied by.
    """

    TENSORS = ("bias", "log_scale", "key_norm")
    """Names of all parameters and buffers."""

    def __init__(self, decoder: Decoder, layer: int, settings: MemorySettings) -> None:
        """Make the gates of a layer."""
        num_heads, _ = decoder.count_heads(layer)
        super().__init__(
            num_heads, settings.bias, settings.temperature, joint=settings.combine == "joint"
        )
        self.layer = layer
        self.settings = settings
        self._decoder = decoder
        own_window = decoder.own_windows[layer]
        self._window = min(settings.window, own_window or settings.window)
        self.key_norm: Tensor | None
        self.register_buffer("key_norm", None)

    def set_key_norm(self, norm: Tensor) -> None:
        """From now on, make keys so long: a number per head (H_kv,). In place."""
        self.key_norm = norm.to(self.bias.device)

    def add(
        self,
        step: Step,
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
            step: the call.
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
        num_new = query.shape[2]
        softcap = kwargs.get("softcap")
        scaling = 1.0 / math.sqrt(query.shape[-1]) if scaling is None else scaling
        free_key = self._free(module, key[:, :, -num_new:].detach(), kwargs)
        new_value = value[:, :, -num_new:].detach()
        if self.key_norm is not None:
            norm = self.key_norm.to(free_key).view(-1, 1, 1)
            free_key = nn.functional.normalize(free_key, dim=-1) * norm
        if step.collected is not None:
            step.collected[self.layer] = (free_key, new_value)
            if self.layer == max(step.settings.layers):
                step.is_cut = True
                raise EntriesRead
        open_heads = step.text.open_heads[self.layer]
        if not open_heads.is_any:
            return output
        asked = self._free(module, open_heads.ask(query), kwargs, distance=self.settings.distance)
        stored = open_heads.take_keys(free_key), open_heads.take_keys(new_value)
        attended = []
        for found in step.walk(self.layer, self._window, asked, *stored):
            part = self.attend(
                asked[:, :, found.columns],
                found.parts,
                scaling,
                softcap,
                None if open_heads.heads is None else open_heads.asked,
            ).keep(open_heads)
            step.tell(self.layer, found, part.shares)
            attended.append(part)
        if not any(part.shares for part in attended):
            return output
        memory = attended[0]
        if len(attended) > 1:
            memory = Attended(
                torch.cat([part.output for part in attended], 2),
                torch.cat([part.log_sum for part in attended], 2),
            )
        local_sum = None
        if self.joint:
            if mask is not None and mask.dim() == 4 and mask.shape[1] > 1:
                mask = open_heads.ask(mask)
            local_sum = sum_local_scores(
                open_heads.ask(query), open_heads.take_keys(key), mask, scaling, softcap
            )
            local_sum = open_heads.keep(local_sum)
        local = output.transpose(1, 2)
        heads = open_heads.heads
        if heads is None:
            return self.mix(local, memory, local_sum).transpose(1, 2)
        mixed = self.mix(local.index_select(1, heads), memory, local_sum, heads)
        return local.index_copy(1, heads, mixed.to(local.dtype)).transpose(1, 2)

    def plan_open_heads(self) -> OpenHeads:
        """Which heads read the memory, by their gates as they are now."""
        num_heads, num_key_heads = self._decoder.count_heads(self.layer)
        assert num_heads == len(self.bias)
        # The index of a folder is saved with all heads.
        is_sealed = isinstance(parse_index(self.settings.index), SealedSettings)
        return plan_open_heads(
            self.list_open(), num_key_heads, self.bias.device, keep_keys=is_sealed
        )

    def _free(
        self, module: nn.Module, x: Tensor, kwargs: dict[str, Any], distance: int = 0
    ) -> Tensor:
        """Queries or keys (B, H, T, D) of this call without their positions, at `distance`."""
        if not self._decoder.is_rotated(self.layer):
            return x
        position = kwargs.get("position_ids")
        if position is None:
            raise ConfigError(
                f"{type(module).__name__} is not told the positions of its tokens, so its keys "
                "cannot be stored without them; see FAMILIES of "
                "memorizing.huggingface.attaching.families"
            )
        rotation = self._decoder.look_up_rotation(self.layer, position - distance, x)
        return rotate_back(module, x, rotation)


def find_memory(module: nn.Module) -> MemoryLayer | None:
    """The memory of an attention layer."""
    layer = module._modules.get("memory")
    return layer if isinstance(layer, MemoryLayer) else None
