"""Attention over what was retrieved, and its two ways to meet local attention.

Shapes: B rows, H heads, T queries, k neighbors, D head_dim.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import embedding_bag

from memorizing.memory import Retrieved


def attend_to_retrieved(
    queries: Tensor, retrieved: Retrieved, scale: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """V_m = softmax(q . k over the k retrieved keys only) of the k values (paper, section 3.1).

    The search used these queries without gradient and without scale; here they are live, so that
    queries and scale learn. The entries take no gradient. Missing entries weigh exactly 0, and a
    query with none gets V_m = 0.

    Args:
        queries: (B, H, T, D), scaled.
        retrieved: what the search found for them before they were scaled.
        scale: (H,), by which they were scaled after the search; None is 1.

    Returns:
        V_m (B, H, T, D); weights (B, H, T, k) without gradient; log-sum-exp of the scores
        (B, H, T), -inf where nothing was found.
    """
    if queries.device.type == "cpu" and queries.dtype == retrieved.stored_keys.dtype:
        # The search has scored these very queries in this dtype: the keys are not needed again.
        scores = retrieved.neighbors.scores
        scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
        if scale is not None:
            scores = scores * scale.detach().to(scores.dtype).view(-1, 1, 1)
        return _AttentionInPlace.apply(queries, scores, retrieved)
    return attend_to_copies(queries, retrieved)


def attend_to_copies(
    queries: Tensor, retrieved: Retrieved, softcap: float | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """As `attend_to_retrieved`, with autograd's own backward, from copies of all that was found.

    `softcap` c, where given, bounds the scores: c tanh(score / c), as some models do.
    """
    dtype = queries.dtype
    keys, values = retrieved.fetch_keys().to(dtype), retrieved.fetch_values().to(dtype)
    scores = torch.matmul(keys, queries.unsqueeze(-1)).squeeze(-1)
    scores = scores if dtype == torch.float64 else scores.float()
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    weights, log_sum = _normalize(scores, retrieved.neighbors.valid)
    output = torch.matmul(weights.to(dtype).unsqueeze(-2), values).squeeze(-2)
    return output, weights.detach(), log_sum


def _normalize(scores: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
    """Softmax and log-sum-exp over the valid ones of scores (B, H, T, k)."""
    # A finite filler keeps queries without any entry free of NaN, in value and in gradient.
    weights = torch.softmax(scores.masked_fill(~valid, torch.finfo(scores.dtype).min), dim=-1)
    weights = weights.masked_fill(~valid, 0.0)
    filled = valid.any(-1)
    log_sum = torch.logsumexp(scores.masked_fill(~(valid | ~filled.unsqueeze(-1)), -torch.inf), -1)
    return weights, log_sum.masked_fill(~filled, -torch.inf)


class _AttentionInPlace(torch.autograd.Function):
    """Reads entries where they are stored.

    Copies of k entries per query are made for the gradient of the weights only, head by head.
    """

    @staticmethod
    def forward(
        ctx, queries: Tensor, scores: Tensor, retrieved: Retrieved
    ) -> tuple[Tensor, Tensor, Tensor]:
        weights, log_sum = _normalize(scores, retrieved.neighbors.valid)
        output = _sum_weighted(retrieved.stored_values, retrieved.value_lines, weights)
        ctx.save_for_backward(weights)
        ctx.retrieved = retrieved
        ctx.mark_non_differentiable(weights)
        return output, weights, log_sum

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads: Tensor) -> tuple[Tensor, None, None]:
        grad_output, _, grad_log_sum = grads
        retrieved: Retrieved = ctx.retrieved
        retrieved.check_unchanged()
        (weights,) = ctx.saved_tensors
        grad_weights = torch.empty_like(weights)
        num_heads, num_queries, k = weights.shape[1:]
        copies = retrieved.stored_values.new_empty(
            num_queries * k, retrieved.stored_values.shape[1]
        )
        for row in range(weights.shape[0]):
            for head in range(num_heads):
                lines = retrieved.value_lines[row, head].flatten()
                torch.index_select(retrieved.stored_values, 0, lines, out=copies)
                grad_weights[row, head] = torch.bmm(
                    grad_output[row, head].unsqueeze(1), copies.view(num_queries, k, -1).mT
                ).squeeze(1)
        # Of the softmax, and of the logarithm of its denominator.
        mean = (weights * grad_weights).sum(-1, keepdim=True)
        grad_scores = weights * (grad_weights - mean + grad_log_sum.unsqueeze(-1))
        return _sum_weighted(retrieved.stored_keys, retrieved.key_lines, grad_scores), None, None


def _sum_weighted(stored: Tensor, lines: Tensor, weights: Tensor) -> Tensor:
    """Sum over k of weights (B, H, T, k) times the stored lines: (B, H, T, D)."""
    k = lines.shape[-1]
    total = embedding_bag(
        lines.reshape(-1, k),
        stored,
        mode="sum",
        per_sample_weights=weights.to(stored.dtype).view(-1, k),
    )
    return total.view(*lines.shape[:-1], stored.shape[1])


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
