"""Attention over what was retrieved, and its two ways to meet local attention.

Shapes: B rows, H heads, T queries, k neighbors, D head_dim.
"""

from __future__ import annotations

import torch
from torch import Tensor

from memorizing.memory import Retrieved


def attend_to_retrieved(queries: Tensor, retrieved: Retrieved) -> tuple[Tensor, Tensor, Tensor]:
    """V_m = softmax(q . k over the k retrieved keys only) of the k values (paper, section 3.1).

    The search used these queries without gradient and without scale; here they are live, so that
    queries and scale learn. The entries take no gradient. Missing entries weigh exactly 0, and a
    query with none gets V_m = 0.

    Args:
        queries: (B, H, T, D), scaled.
        retrieved: keys, values (B, H, T, k, D) and their validity.

    Returns:
        V_m (B, H, T, D); weights (B, H, T, k); log-sum-exp of the scores (B, H, T), -inf where
        nothing was found.
    """
    dtype = queries.dtype
    scores = torch.matmul(retrieved.keys.to(dtype), queries.unsqueeze(-1)).squeeze(-1)
    scores = scores if dtype == torch.float64 else scores.float()
    valid = retrieved.neighbors.valid
    # A finite filler keeps rows without any entry free of NaN, in value and in gradient.
    weights = torch.softmax(scores.masked_fill(~valid, torch.finfo(scores.dtype).min), dim=-1)
    weights = weights.masked_fill(~valid, 0.0)
    output = torch.matmul(weights.to(dtype).unsqueeze(-2), retrieved.values.to(dtype)).squeeze(-2)
    filled = valid.any(-1)
    log_sum = torch.logsumexp(scores.masked_fill(~(valid | ~filled.unsqueeze(-1)), -torch.inf), -1)
    return output, weights, log_sum.masked_fill(~filled, -torch.inf)


def combine_by_gate(
    local: Tensor, memory: Tensor, gate_bias: Tensor, has_entries: Tensor
) -> Tensor:
    """V = g V_m + (1 - g) V_c, g = sigmoid(b_g), b_g learned per head (paper, section 3.1).

    **Deviation:** where a query found nothing the gate is closed and the result is V_c itself; the
    authors' code gives (1 - g) V_c there.

    Args:
        local: V_c (B, H, T, D).
        memory: V_m (B, H, T, D).
        gate_bias: b_g (H,).
        has_entries: (B, H, T) bool.
    """
    gate = torch.sigmoid(gate_bias).to(local.dtype).view(-1, 1, 1)
    return torch.where(has_entries.unsqueeze(-1), local + gate * (memory - local), local)


def combine_jointly(
    local: Tensor,
    memory: Tensor,
    local_log_sum: Tensor,
    memory_log_sum: Tensor,
    has_entries: Tensor,
) -> Tensor:
    """One softmax over local and retrieved scores, from the two parts' sums.

    Each part is a softmax of its own; in the joint one it has the share of its denominator:
    V = g V_m + (1 - g) V_c with g = sigmoid(log_sum_m - log_sum_c).
    """
    gate = torch.sigmoid(memory_log_sum - local_log_sum).to(local.dtype).unsqueeze(-1)
    return torch.where(has_entries.unsqueeze(-1), local + gate * (memory - local), local)
