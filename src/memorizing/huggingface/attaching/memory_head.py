"""What a memory layer of an existing model has besides its own weights.

Shapes: B rows, H heads of queries, H_kv heads of keys, T queries, S keys, D head_dim, k neighbors.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from memorizing.huggingface.attaching.open_heads import OpenHeads
from memorizing.memory import Retrieved
from memorizing.model.memory_attention import (
    attend_to_copies,
    attend_to_retrieved,
    combine_by_gate,
    combine_jointly,
)

CLOSED = -30.0
"""Bias of a head that does not read: sigmoid(-30) is 1e-13."""
_READS = CLOSED + 1.0
"""Heads with a bias above it read."""


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

    def keep(self, open_heads: OpenHeads) -> Attended:
        """That of the heads that read, of what a search was asked for."""
        return Attended(
            open_heads.keep(self.output),
            open_heads.keep(self.log_sum),
            tuple(open_heads.keep(shares) for shares in self.shares),
        )


class MemoryHead(nn.Module):
    """Gate and scale of one memory layer, a number each per head of queries.

    With the gate, V = g V_m + (1 - g) V_c and g = sigmoid(bias) (paper, section 3.1). With the
    joint softmax, g is the share of the retrieved scores in one softmax over both, their scores
    raised by `bias`: g = sigmoid(logsumexp_m + bias - logsumexp_c). Retrieved scores are multiplied
    by exp(log_scale) besides what the layer multiplies scores by.
    """

    def __init__(self, num_heads: int, bias: float, temperature: float, *, joint: bool) -> None:
        """Start all heads alike."""
        super().__init__()
        self.joint = joint
        self.bias = nn.Parameter(torch.full((num_heads,), float(bias)))
        self.log_scale = nn.Parameter(torch.full((num_heads,), -math.log(temperature)))
        self.strength: Tensor | None = None
        """(H,): shares of what the memory changes that are let through, while it is calibrated."""

    def attend(
        self,
        queries: Tensor,
        parts: Sequence[Retrieved],
        scaling: float,
        softcap: float | None,
        heads: Tensor | None = None,
    ) -> Attended:
        """Attention over all that was retrieved, from any number of stores.

        Args:
            queries: (B, H, T, D), as the search used them, live.
            parts: what the search found, at most k over all parts for each query.
            scaling: of the layer.
            softcap: bound of the layer's scores, or None.
            heads: (H,) int64: which heads of the layer these are; None is all.
        """
        if not parts:
            nothing = queries.new_full(queries.shape[:3], -torch.inf, dtype=torch.float32)
            return Attended(torch.zeros_like(queries), nothing)
        scale = torch.exp(_take(self.log_scale, heads).float()) * scaling
        scaled = queries * scale.to(queries.dtype).view(-1, 1, 1)
        attended = [
            attend_to_retrieved(scaled, part, scale)
            if softcap is None
            else attend_to_copies(scaled, part, softcap=softcap)
            for part in parts
        ]
        if len(attended) == 1:
            output, weights, total = attended[0]
            return Attended(output, total, (weights,))
        sums = [log_sum for _, _, log_sum in attended]
        total = _add_log_sums(sums)
        # A finite total keeps queries without any entry free of NaN, in value and in gradient.
        finite = total.masked_fill(total == -torch.inf, 0.0)
        shares = [torch.exp(log_sum - finite).unsqueeze(-1) for log_sum in sums]
        output = torch.zeros_like(queries)
        for share, (part_output, _, _) in zip(shares, attended, strict=True):
            output = output + share.to(queries.dtype) * part_output
        return Attended(
            output,
            total,
            tuple(
                weights * share.detach()
                for share, (_, weights, _) in zip(shares, attended, strict=True)
            ),
        )

    def mix(
        self,
        local: Tensor,
        memory: Attended,
        local_sum: Tensor | None,
        heads: Tensor | None = None,
    ) -> Tensor:
        """The layer's output (B, H, T, D); exactly `local` where nothing was found.

        Args:
            local: V_c (B, H, T, D).
            memory: of the same heads.
            local_sum: (B, H, T): log-sum-exp of the local scores; the gate does not need it.
            heads: as in `attend`.
        """
        bias = _take(self.bias, heads)
        if local_sum is None:
            mixed = combine_by_gate(local, memory.output, bias, memory.found)
        else:
            raised = memory.log_sum + bias.view(-1, 1)
            mixed = combine_jointly(local, memory.output, local_sum, raised, memory.found)
        if self.strength is None:
            return mixed
        strength = _take(self.strength, heads).to(local.dtype).view(-1, 1, 1)
        return local + strength * (mixed - local)

    def list_open(self) -> list[bool]:
        """Of every head, whether it reads the memory."""
        return (self.bias.detach() > _READS).tolist()

    def close_all_but(self, heads: Sequence[int]) -> None:
        """Close the gates of all other heads. In place."""
        closed = torch.ones_like(self.bias, dtype=torch.bool)
        closed[list(heads)] = False
        with torch.no_grad():
            self.bias.masked_fill_(closed, CLOSED)


def _take(per_head: Tensor, heads: Tensor | None) -> Tensor:
    return per_head if heads is None else per_head.index_select(0, heads)


def _add_log_sums(sums: Sequence[Tensor]) -> Tensor:
    """Log of the summed exponentials of all, -inf where all are; without NaN in the gradient."""
    stacked = torch.stack(list(sums))
    is_nothing = (stacked == -torch.inf).all(0)
    total = stacked.masked_fill(is_nothing, 0.0).logsumexp(0)
    return total.masked_fill(is_nothing, -torch.inf)


def sum_local_scores(
    queries: Tensor,
    keys: Tensor,
    mask: Tensor | None,
    scaling: float,
    softcap: float | None,
) -> Tensor:
    """Log-sum-exp (B, H, T) of the scores of local attention, as the layer itself has them.

    It is finite also for padding, which may see nothing.

    Args:
        queries: (B, H, T, D).
        keys: (B, H_kv, S, D).
        mask: None is causal, aligned at the end; bool (True is seen) or added to the scores.
        scaling: of the layer.
        softcap: bound of the scores, or None.
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
    return torch.logsumexp(scores, -1)
