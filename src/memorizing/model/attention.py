"""Attention over the local context, and over what was retrieved; and the two ways they meet.

Local attention has T5's relative position bias (Raffel et al. 2020; paper, section 3).
`scaled_dot_product_attention` with a bias that needs a gradient takes a slow path on CPUs, and the
plain product of a segment with its context is masked away by half. Here the queries go through in
blocks, so that scores stay in the cache and keys outside the window are left out, with a
hand-written backward.

Shapes: B rows, H heads, T queries, S keys, D head_dim, R queries of a block, k neighbors.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import embedding_bag

from memorizing.memory import Retrieved

_LEAST_BLOCK = 32
"""Queries of a block, where a share of the window is less."""


def choose_block_len(window: int, device: torch.device) -> int:
    """Queries that local attention takes together: a quarter of the window, or all of it.

    On a CPU fewer queries see fewer keys in vain; a GPU would rather start fewer operations.
    """
    return max(_LEAST_BLOCK, window // 4 if device.type == "cpu" else window)


def compute_buckets(distances: Tensor, num_buckets: int, max_distance: int) -> Tensor:
    """Bucket of each distance query - key >= 0: T5's causal buckets.

    Half of the buckets hold one distance each, the other half grow logarithmically up to
    `max_distance`; all that is farther shares the last.
    """
    num_exact = num_buckets // 2
    ratio = distances.clamp(min=num_exact).double() / num_exact
    large = (
        num_exact
        + (ratio.log() / math.log(max_distance / num_exact) * (num_buckets - num_exact)).long()
    )
    return torch.where(distances < num_exact, distances, large.clamp(max=num_buckets - 1))


class PositionBias(nn.Module):
    """A learned bias per head and bucket of distances, 0 at the start."""

    def __init__(self, num_heads: int, num_buckets: int, max_distance: int, window: int) -> None:
        """Make a table for distances from 0 to window - 1."""
        super().__init__()
        self.table = nn.Parameter(torch.zeros(num_heads, num_buckets))
        self.window = window
        self.num_buckets, self.max_distance = num_buckets, max_distance
        self._buckets: Tensor | None = None

    def _compute_by_distance(self) -> Tensor:
        if self._buckets is None or self._buckets.device != self.table.device:
            # Kept for training too, where a tensor made in inference mode would be of no use.
            with torch.inference_mode(False):
                # By one processor's logarithm, whatever the device: bounds of buckets are close.
                distances = torch.arange(self.window, device="cpu")
                buckets = compute_buckets(distances, self.num_buckets, self.max_distance)
                self._buckets = buckets.to(self.table.device)
        # index_select: its backward is a plain index_add, unlike that of a general gather.
        return self.table.index_select(1, self._buckets)

    def forward(self, num_queries: int, dtype: torch.dtype) -> Tensor:
        """Bias (H, R, W + R) of any block of R neighboring queries, for `attend_locally`.

        R is at most `num_queries`. The keys are those from W before the block's first query to its
        last, for a window of W; -inf outside the causal window.
        """
        block_len = min(num_queries, choose_block_len(self.window, self.table.device))
        by_distance = self._compute_by_distance()
        masked = by_distance.new_full((by_distance.shape[0], block_len), -math.inf)
        # From the farthest key of the last query to the (masked) future of the first.
        line = torch.cat([masked, by_distance.flip(1), masked[:, :-1]], dim=1)
        return _ExpandDiagonals.apply(line.to(dtype), block_len, self.window + block_len)


class _ExpandDiagonals(torch.autograd.Function):
    """(H, S + T - 1) to (H, T, S): result[h, i, j] = line[h, j + T - 1 - i]."""

    @staticmethod
    def forward(ctx, line: Tensor, num_queries: int, num_keys: int) -> Tensor:
        ctx.shape = (line.shape[0], num_queries, num_keys)
        # Contiguous, because it is added to the scores of every row and block.
        return line.unfold(1, num_keys, 1).flip(1).contiguous()

    @staticmethod
    def backward(ctx, *grads: Tensor) -> tuple[Tensor, None, None]:
        heads, queries, keys = ctx.shape
        padded = nn.functional.pad(grads[0].flip(1), (0, queries)).view(heads, -1)
        width = keys + queries - 1
        return padded[:, : queries * width].view(heads, queries, width).sum(1), None, None


def attend_locally(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    bias: Tensor,
    num_hidden_keys: Sequence[int],
    *,
    num_frozen_keys: int = 0,
    need_log_sum: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """V_c = softmax(Q K^T + bias) V (paper, section 3), and the log of the softmax's denominator.

    Args:
        queries: (B, H, T, D), already scaled: the last T of S contiguous tokens.
        keys: (B, H, S, D).
        values: (B, H, S, D).
        bias: (H, R, W + R), the same for every block of R queries that are neighbors, with the keys
            from W before the block's first query to its last. -inf where a query must not look;
            every query sees one key at least.
        num_hidden_keys: per row, how many of the first keys do not exist (a cache that is not
            full).
        num_frozen_keys: the first keys and values that need no gradient and get 0.
        need_log_sum: whether the second result is wanted.

    Returns:
        (B, H, T, D), and (B, H, T) log-sum-exp of the scores or None. Both have gradients to all
        four tensors, but no second derivatives: asking for them raises.
    """
    return _LocalAttention.apply(
        queries, keys, values, bias, tuple(num_hidden_keys), num_frozen_keys, need_log_sum
    )


class _LocalAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx,
        queries: Tensor,
        keys: Tensor,
        values: Tensor,
        bias: Tensor,
        num_hidden_keys: tuple[int, ...],
        num_frozen_keys: int,
        need_log_sum: bool,
    ) -> tuple[Tensor, Tensor | None]:
        output = torch.empty_like(queries, memory_format=torch.contiguous_format)
        wide = torch.promote_types(queries.dtype, torch.float32)
        log_sum = torch.empty(queries.shape[:3], dtype=wide, device=queries.device)
        kept = []
        for rows, columns, places in _iterate_blocks(queries.shape[2], keys.shape[2], bias):
            scores = torch.matmul(queries[:, :, rows], keys[:, :, columns].transpose(-1, -2))
            scores += bias[:, : scores.shape[2], places]
            for row, num_hidden in enumerate(num_hidden_keys):
                if num_hidden > columns.start:
                    scores[row, :, :, : num_hidden - columns.start] = -math.inf
            if need_log_sum:
                log_sum[:, :, rows] = torch.logsumexp(scores.to(wide), -1)
            probabilities = torch.softmax(scores, dim=-1)
            output[:, :, rows] = torch.matmul(probabilities, values[:, :, columns])
            kept.append(probabilities)
        ctx.save_for_backward(queries, keys, values, bias, *kept)
        ctx.num_frozen_keys = num_frozen_keys
        return output, log_sum if need_log_sum else None

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad_output, grad_log_sum = grads
        queries, keys, values, bias, *kept = ctx.saved_tensors
        wide = torch.promote_types(queries.dtype, torch.float32)
        grad_queries = torch.empty_like(queries, memory_format=torch.contiguous_format)
        # Blocks overlap: what they add to the same keys and biases is summed in fp32.
        grad_keys, grad_values = (torch.zeros_like(part, dtype=wide) for part in (keys, values))
        grad_bias = torch.zeros_like(bias, dtype=wide) if ctx.needs_input_grad[3] else None
        blocks = _iterate_blocks(queries.shape[2], keys.shape[2], bias)
        for (rows, columns, places), probabilities in zip(blocks, kept, strict=True):
            grad_block = grad_output[:, :, rows]
            grad_scores = torch.ops.aten._softmax_backward_data(
                torch.matmul(grad_block, values[:, :, columns].transpose(-1, -2)),
                probabilities,
                -1,
                probabilities.dtype,
            )
            if grad_log_sum is not None:
                share = grad_log_sum[:, :, rows].unsqueeze(-1).to(probabilities.dtype)
                grad_scores += probabilities * share
            grad_queries[:, :, rows] = torch.matmul(grad_scores, keys[:, :, columns])
            first = max(columns.start, ctx.num_frozen_keys)
            if first < columns.stop:
                live = slice(first - columns.start, None)
                of_scores, of_values = (
                    part[..., live].transpose(-1, -2) for part in (grad_scores, probabilities)
                )
                grad_keys[:, :, first : columns.stop] += torch.matmul(
                    of_scores, queries[:, :, rows]
                )
                grad_values[:, :, first : columns.stop] += torch.matmul(of_values, grad_block)
            if grad_bias is not None:
                over_rows = grad_scores.sum(0) if len(grad_scores) > 1 else grad_scores[0]
                grad_bias[:, : grad_scores.shape[2], places] += over_rows
        return (
            grad_queries,
            grad_keys.to(keys.dtype),
            grad_values.to(values.dtype),
            None if grad_bias is None else grad_bias.to(bias.dtype),
            None,
            None,
            None,
        )


def _iterate_blocks(
    num_queries: int, num_keys: int, bias: Tensor
) -> Iterator[tuple[slice, slice, slice]]:
    """Queries of each block, the keys they may see, and where these stand in the block's bias."""
    block_len = bias.shape[1]
    context = bias.shape[2] - block_len
    for start in range(0, num_queries, block_len):
        stop = min(start + block_len, num_queries)
        own = num_keys - num_queries + start
        first = max(0, own - context)
        last = num_keys - num_queries + stop
        offset = context - (own - first)
        yield slice(start, stop), slice(first, last), slice(offset, offset + last - first)


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
        V_m (B, H, T, D); weights (B, H, T, k); log-sum-exp of the scores (B, H, T), -inf where
        nothing was found.
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
    return output, weights, log_sum


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
        ctx.set_materialize_grads(False)
        return output, weights, log_sum

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads: Tensor | None) -> tuple[Tensor, None, None]:
        grad_output, grad_weights, grad_log_sum = grads
        retrieved: Retrieved = ctx.retrieved
        retrieved.check_unchanged()
        (weights,) = ctx.saved_tensors
        if grad_weights is None:
            grad_scores = torch.zeros_like(weights)
        else:
            grad_scores = grad_weights.clone(memory_format=torch.contiguous_format)
        if grad_output is not None:
            _add_products(grad_scores, grad_output, retrieved)
        # Of the softmax, and of the logarithm of its denominator.
        grad_scores -= (weights * grad_scores).sum(-1, keepdim=True)
        if grad_log_sum is not None:
            grad_scores += grad_log_sum.unsqueeze(-1)
        grad_scores *= weights
        return _sum_weighted(retrieved.stored_keys, retrieved.key_lines, grad_scores), None, None


def _add_products(total: Tensor, queries: Tensor, retrieved: Retrieved) -> None:
    """Add the products of queries (B, H, T, D) with the found values to (B, H, T, k). In place."""
    num_heads, num_queries, k = total.shape[1:]
    copies = retrieved.stored_values.new_empty(num_queries * k, retrieved.stored_values.shape[1])
    for row in range(total.shape[0]):
        for head in range(num_heads):
            lines = retrieved.value_lines[row, head].flatten()
            torch.index_select(retrieved.stored_values, 0, lines, out=copies)
            total[row, head] += torch.bmm(
                queries[row, head].unsqueeze(1), copies.view(num_queries, k, -1).mT
            ).squeeze(1)


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
    local: Tensor,
    memory: Tensor,
    gate_bias: Tensor,
    has_entries: Tensor,
    empty_value: Tensor | None = None,
) -> Tensor:
    """V = g V_m + (1 - g) V_c, g = sigmoid(b_g), b_g learned per head (paper, section 3.1).

    **Deviation:** where a query found nothing V_m is v_0, learned per head; without a v_0 the gate
    is closed there and the result is V_c itself. The authors' code gives (1 - g) V_c, which is
    where v_0 starts.

    Args:
        local: V_c (B, H, T, D).
        memory: V_m (B, H, T, D).
        gate_bias: b_g (H,).
        has_entries: (B, H, T) bool.
        empty_value: v_0 (H, D), or none.
    """
    gate = torch.sigmoid(gate_bias).to(local.dtype).view(-1, 1, 1)
    other = local if empty_value is None else empty_value.to(local.dtype).unsqueeze(1)
    return local + gate * (torch.where(has_entries.unsqueeze(-1), memory, other) - local)


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
