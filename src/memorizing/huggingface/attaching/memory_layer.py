"""The module that `add_memory` puts on an attention layer: its gates, and which heads read.

Nothing is searched for heads that do not read. A text's own memory has nothing but the heads of
keys that are read; a memory that documents were read into has all of them, so that it may be opened
with other gates.

Shapes: B rows, H heads of queries, H_kv heads of keys, T queries, S keys, D head_dim, k neighbors.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from memorizing.huggingface.attaching.decoder import Decoder
from memorizing.huggingface.attaching.memory_settings import MemorySettings
from memorizing.memory import Retrieved
from memorizing.model.attention import (
    attend_to_copies,
    attend_to_retrieved,
    combine_by_gate,
    combine_jointly,
)

CLOSED = -30.0
"""Bias of a head that does not read: sigmoid(-30) is 1e-13."""
_READS = CLOSED + 1.0
"""Heads with a bias above it read."""


def is_open(bias: Tensor) -> Tensor:
    """Whether heads of such biases read."""
    return bias > _READS


@dataclass(frozen=True)
class OpenHeads:
    """Heads of queries that read, and those of keys that they read.

    A search is asked for equally many heads of queries per head of keys, those of a key head side
    by side. Where fewer of a group read than of another, its first is asked for again.
    """

    key_heads: tuple[int, ...]
    """Heads of keys that are searched, ascending."""
    num_key_heads: int
    """H_kv."""
    heads: Tensor | None
    """(H_open,) int64: heads of queries that read, ascending; None is all, in their places."""
    asked: Tensor
    """(P,) int64: the head of queries at each place of a search."""
    places: Tensor
    """(H_open,) int64: where in `asked` each of `heads` stands."""
    keys: Tensor
    """(K,) int64: `key_heads`."""

    @property
    def is_any(self) -> bool:
        """Whether any head reads."""
        return len(self.places) > 0

    @property
    def has_all_keys(self) -> bool:
        """Whether all heads of keys are searched."""
        return len(self.key_heads) == self.num_key_heads

    def ask(self, queries: Tensor) -> Tensor:
        """What the search is asked (B, P, T, D), of queries (B, H, T, D)."""
        return queries if self.heads is None else queries.index_select(1, self.asked)

    def take_keys(self, entries: Tensor) -> Tensor:
        """Keys or values (B, K, T, D) that are stored, of those of all heads (B, H_kv, T, D)."""
        return entries if self.has_all_keys else entries.index_select(1, self.keys)

    def keep(self, found: Tensor) -> Tensor:
        """Of what was found (B, P, ...), that of the heads that read (B, H_open, ...)."""
        return found if self.heads is None else found.index_select(1, self.places)


def plan_open_heads(
    is_open: Sequence[bool],
    num_key_heads: int,
    device: torch.device,
) -> OpenHeads:
    """Plan for the heads of a layer.

    Args:
        is_open: of every head of queries, whether it reads.
        num_key_heads: H_kv, of which each serves equally many heads of queries, side by side.
        device: where the layer computes.
    """
    num_groups = len(is_open) // num_key_heads
    groups = [
        [head for head in range(first, first + num_groups) if is_open[head]]
        for first in range(0, len(is_open), num_groups)
    ]
    heads = [head for group in groups for head in group]
    key_heads = tuple(key for key, group in enumerate(groups) if group)
    num_asked = max(map(len, groups))
    asked, places = [], []
    for key in key_heads:
        group = groups[key]
        places += range(len(asked), len(asked) + len(group))
        asked += group + group[:1] * (num_asked - len(group))
    # Made in inference mode they could not be used with gradients outside of it.
    with torch.inference_mode(False):
        tensors = [
            torch.tensor(numbers, dtype=torch.int64, device=device)
            for numbers in (heads, asked, places, key_heads)
        ]
    return OpenHeads(
        key_heads,
        num_key_heads,
        None if all(is_open) else tensors[0],
        *tensors[1:],
    )


@dataclass(frozen=True)
class Attended:
    """Attention over what was retrieved."""

    output: Tensor
    """V_m (B, H, T, D); 0 where nothing was found."""
    log_sum: Tensor
    """(B, H, T): log-sum-exp of the scores, -inf where nothing was found."""
    shares: tuple[Tensor, ...] = ()
    """Per part, the share (B, H, T, k) of each entry in all retrieved scores; without gradient."""

    @property
    def found(self) -> Tensor:
        """(B, H, T) bool: whether something was found."""
        return self.log_sum > -torch.inf


class MemoryLayer(nn.Module):
    """Gate and scale of one memory layer, a number each per head of queries; only they are learned.

    With the gate, V = g V_m + (1 - g) V_c and g = sigmoid(bias) (paper, section 3.1). With the
    joint softmax, g is the share of the retrieved scores in one softmax over both, their scores
    raised by `bias`: g = sigmoid(logsumexp_m + bias - logsumexp_c). Retrieved scores are multiplied
    by exp(log_scale) besides what the layer multiplies scores by.

    With `search="normalized"` the buffer `key_norm` (H_kv,) is set, which unit keys are multiplied
    by.
    """

    TENSORS = ("bias", "log_scale", "key_norm")
    """Names of all parameters and buffers."""

    def __init__(self, decoder: Decoder, layer: int, settings: MemorySettings) -> None:
        """Start all heads alike."""
        super().__init__()
        num_heads = decoder.shapes[layer][0]
        self.bias = nn.Parameter(torch.full((num_heads,), float(settings.bias)))
        self.log_scale = nn.Parameter(torch.full((num_heads,), -math.log(settings.temperature)))
        self.key_norm: Tensor | None
        self.register_buffer("key_norm", None)
        self.joint = settings.combine == "joint"
        self.layer = layer
        self.settings = settings
        self._decoder = decoder
        # Tokens that local attention sees.
        own_window = decoder.own_windows[layer]
        self.window = min(settings.window, own_window or settings.window)

    def attend(
        self,
        queries: Tensor,
        parts: Sequence[Retrieved],
        scaling: float,
        softcap: float | None,
        heads: OpenHeads | None = None,
    ) -> Attended:
        """Attention over all that was retrieved, from any number of stores.

        Args:
            queries: (B, H, T, D), as the search used them, live; or (B, P, T, D), see `heads`.
            parts: what the search found, at most k over all parts for each query.
            scaling: of the layer.
            softcap: bound of the layer's scores, or None.
            heads: that asked; None is all. The result is of those that read.
        """
        scale = self._find_scale(scaling, heads)
        scaled = queries * scale.to(queries.dtype).view(-1, 1, 1)
        attended = [
            attend_to_retrieved(scaled, part, scale)
            if softcap is None
            else attend_to_copies(scaled, part, softcap=softcap)
            for part in parts
        ]
        if heads is not None:
            attended = [tuple(map(heads.keep, part)) for part in attended]
            queries = heads.keep(queries)
        if len(attended) == 1:
            output, weights, total = attended[0]
            return Attended(output, total, (weights.detach(),))
        sums = [log_sum for _, _, log_sum in attended]
        total = _add_log_sums(sums, queries)
        # A finite total keeps queries without any entry free of NaN, in value and in gradient.
        finite = total.masked_fill(total == -torch.inf, 0.0)
        output, shares = torch.zeros_like(queries), []
        for part_output, weights, log_sum in attended:
            share = torch.exp(log_sum - finite).unsqueeze(-1)
            output = output + share.to(queries.dtype) * part_output
            shares.append(weights.detach() * share.detach())
        return Attended(output, total, tuple(shares))

    def _find_scale(self, scaling: float, heads: OpenHeads | None) -> Tensor:
        asked = None if heads is None or heads.heads is None else heads.asked
        return torch.exp(_take(self.log_scale, asked).float()) * scaling

    def scale(self, queries: Tensor, scaling: float, heads: OpenHeads) -> Tensor:
        """Queries (B, P, T, D) in fp32, so that their products with keys are scores."""
        return queries.float() * self._find_scale(scaling, heads).view(-1, 1, 1)

    def mix(
        self,
        local: Tensor,
        memory: Attended,
        local_sum: Tensor | None,
        heads: Tensor | None = None,
        strength: Tensor | None = None,
    ) -> Tensor:
        """The layer's output (B, H, T, D); exactly `local` where nothing was found.

        Args:
            local: V_c (B, H, T, D).
            memory: of the same heads.
            local_sum: (B, H, T): log-sum-exp of the local scores; the gate does not need it.
            heads: (H,) int64: which heads of the layer these are; None is all.
            strength: (H,) of all heads: shares of what the memory changes that are let through.
        """
        bias = _take(self.bias, heads)
        if local_sum is None:
            mixed = combine_by_gate(local, memory.output, bias, memory.found)
        else:
            raised = memory.log_sum + bias.view(-1, 1)
            mixed = combine_jointly(local, memory.output, local_sum, raised, memory.found)
        if strength is None:
            return mixed
        strength = _take(strength, heads).to(local.dtype).view(-1, 1, 1)
        return local + strength * (mixed - local)

    def find_gates(
        self, memory: Attended, local_sum: Tensor | None, heads: Tensor | None = None
    ) -> Tensor:
        """The gates g (B, H, T) of `mix`, without gradient; 0 where nothing was found."""
        logits = _take(self.bias, heads).detach().view(-1, 1)
        if local_sum is not None:
            logits = logits + memory.log_sum.detach() - local_sum.detach()
        return torch.sigmoid(logits) * memory.found

    def list_open(self) -> list[bool]:
        """Of every head, whether it reads the memory."""
        return is_open(self.bias.detach()).tolist()

    def close_all_but(self, heads: Sequence[int]) -> None:
        """Close the gates of all other heads. In place."""
        closed = torch.ones_like(self.bias, dtype=torch.bool)
        closed[list(heads)] = False
        with torch.no_grad():
            self.bias.masked_fill_(closed, CLOSED)

    def set_key_norm(self, norm: Tensor) -> None:
        """From now on, make keys so long: a number per head (H_kv,). In place."""
        self.key_norm = norm.to(self.bias.device)

    def plan_open_heads(self) -> OpenHeads:
        """Which heads read the memory, by their gates as they are now."""
        num_key_heads = self._decoder.shapes[self.layer][1]
        return plan_open_heads(self.list_open(), num_key_heads, self.bias.device)

    def free_entries(
        self, key: Tensor, value: Tensor, kwargs: dict[str, Any]
    ) -> tuple[Tensor, Tensor]:
        """As `Decoder.free_entries`, with keys as long as they are searched."""
        key, value = self._decoder.free_entries(self.layer, key, value, kwargs)
        if self.key_norm is not None:
            norm = self.key_norm.to(key).view(-1, 1, 1)
            key = nn.functional.normalize(key, dim=-1) * norm
        return key, value

    def free(self, x: Tensor, kwargs: dict[str, Any], distance: int = 0) -> Tensor:
        """Queries (B, H, T, D) of this call without their positions, at `distance`."""
        if not self._decoder.rotated[self.layer]:
            return x
        return self._decoder.rotate_back(self.layer, x, kwargs["position_ids"] - distance)


def _take(per_head: Tensor, heads: Tensor | None) -> Tensor:
    return per_head if heads is None else per_head.index_select(0, heads)


def _add_log_sums(sums: Sequence[Tensor], queries: Tensor) -> Tensor:
    """Log of the summed exponentials of all, -inf where all are; without NaN in the gradient."""
    nothing = queries.new_full(queries.shape[:3], -torch.inf, dtype=torch.float32)
    stacked = torch.stack([nothing, *sums])
    is_nothing = (stacked == -torch.inf).all(0)
    total = stacked.masked_fill(is_nothing, 0.0).logsumexp(0)
    return total.masked_fill(is_nothing, -torch.inf)


def sum_local_scores(
    queries: Tensor,
    keys: Tensor,
    mask: Tensor | None,
    scaling: float,
    softcap: float | None,
    sink: Tensor | None = None,
) -> Tensor:
    """Log-sum-exp (B, H, T) of the scores of local attention, as the layer itself has them.

    It is finite also for padding, which may see nothing.

    Args:
        queries: (B, H, T, D).
        keys: (B, H_kv, S, D).
        mask: None is causal, aligned at the end; bool (True is seen) or added to the scores.
        scaling: of the layer.
        softcap: bound of the scores, or None.
        sink: (1, H, 1): a learned score that the layer's softmax has besides, or None.
    """
    num_groups = queries.shape[1] // keys.shape[1]
    grouped = queries.unflatten(1, (-1, num_groups)).flatten(2, 3)
    scores = torch.matmul(grouped, keys.transpose(-1, -2)).float() * scaling
    scores = scores.view(*queries.shape[:3], keys.shape[2])
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    num_queries, num_keys = scores.shape[2:]
    if mask is None:
        ages = torch.arange(num_queries, device=scores.device).unsqueeze(1) + num_keys - num_queries
        mask = torch.arange(num_keys, device=scores.device) <= ages
    mask = mask[..., :num_keys]
    if mask.dtype == torch.bool:
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    else:
        scores = scores + mask.float()
    total = torch.logsumexp(scores, -1)
    return total if sink is None else torch.logaddexp(total, sink.float())
