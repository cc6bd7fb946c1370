"""What a memory layer of an existing model has besides its own weights.

Shapes: B rows, H heads of queries, H_kv heads of keys, T queries, S keys, D head_dim, k neighbors.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from memorizing.memory import Retrieved
from memorizing.model.memory_attention import (
    attend_to_copies,
    attend_to_retrieved,
    combine_by_gate,
    combine_jointly,
)

CLOSED = -30.0
"""Bias of a head that does not read: sigmoid(-30) is 1e-13."""


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

    def attend(
        self, queries: Tensor, parts: Sequence[Retrieved], scaling: float, softcap: float | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Attention over all that was retrieved, from one or more stores.

        Args:
            queries: (B, H, T, D), as the search used them, live.
            parts: what the search found, at most k over all parts for each query.
            scaling: of the layer.
            softcap: bound of the layer's scores, or None.

        Returns:
            V_m (B, H, T, D); the log-sum-exp of its scores (B, H, T), -inf where nothing was found;
            whether something was found (B, H, T).
        """
        scale = torch.exp(self.log_scale) * scaling
        scaled = queries * scale.to(queries.dtype).view(-1, 1, 1)
        outputs, sums = [], []
        for part in parts:
            if softcap is None:
                output, _, log_sum = attend_to_retrieved(scaled, part, scale)
            else:
                output, _, log_sum = attend_to_copies(scaled, part, softcap=softcap)
            outputs.append(output)
            sums.append(log_sum)
        total = torch.stack(sums).logsumexp(0) if len(sums) > 1 else sums[0]
        found = total > -torch.inf
        if len(outputs) == 1:
            return outputs[0], total, found
        # A finite total keeps queries without any entry free of NaN, in value and in gradient.
        finite = total.masked_fill(~found, 0.0)
        shares = [torch.exp(s - finite).to(queries.dtype).unsqueeze(-1) for s in sums]
        output = sum(share * output for share, output in zip(shares, outputs, strict=True))
        return output, total, found  # type: ignore[return-value]

    def mix(
        self, local: Tensor, memory: Tensor, found: Tensor, memory_sum: Tensor, local_sum: Tensor
    ) -> Tensor:
        """The layer's output (B, H, T, D); exactly `local` where nothing was found.

        `local_sum` (B, H, T): log-sum-exp of the local scores; not used by the gate.
        """
        if not self.joint:
            return combine_by_gate(local, memory, self.bias, found)
        raised = memory_sum + self.bias.view(-1, 1)
        return combine_jointly(local, memory, local_sum, raised, found)

    @property
    def is_open(self) -> bool:
        """Whether any head reads."""
        return bool((self.bias.detach() > CLOSED).any())


def sum_local_scores(
    queries: Tensor,
    keys: Tensor,
    mask: Tensor | None,
    scaling: float,
    softcap: float | None,
) -> Tensor:
    """Log-sum-exp (B, H, T) of the scores of local attention, as the layer itself has them.

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
        seen = torch.arange(num_keys, device=scores.device) <= ages
        scores = scores.masked_fill(~seen, -torch.inf)
    elif mask.dtype == torch.bool:
        scores = scores.masked_fill(~mask[..., :num_keys], -torch.inf)
    else:
        scores = scores + mask[..., :num_keys].float()
    return torch.logsumexp(scores, -1)
