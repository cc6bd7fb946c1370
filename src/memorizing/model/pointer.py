"""Pointing: retrieved entries also say which token comes next, by the tokens that they are of.

Attention can copy a token only through its value, the layers above and the embedding, which a short
training does without certainty, and hardly for a token it has seldom seen. A pointer (Vinyals et
al. 2015; mixed with the vocabulary as in Merity et al. 2017 and See et al. 2017) gives the weights
of the entries to their tokens:

    p(w) = s_0 softmax(z)_w + sum over heads h of s_h p_h(w)
    p_h(w) = sum over j with w_j = w of a_hj

with the logits z, the softmax weights a_hj of the k entries that head h retrieved, the token w_j
that entry j is of, and shares

    s = softmax over 0 and the heads that found something of  B f + c + C relu(E [x, f / 4])

of the last hidden state x and of what was found: f has for each head its best score, as the search
gave it, and how much its entries agree, sum over w of p_h(w)^2.

Shapes: B rows, T tokens, V vocabulary, d model_dim, H heads of all memory layers together, k
neighbors, n = H k.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, relu

from memorizing.devices import split_rows
from memorizing.memory import Retrieved

_START_BIAS = 3.0
"""Of s_0: without evidence the vocabulary has nearly all."""
_START_AGREEMENT = 3.0
"""Of s_h, for each head's own agreement."""
_WIDTH = 64
"""Rows of E."""
_FOUND_SCALE = 0.25
"""Of f where it stands beside x, whose entries are near 1: scores grow to 20."""

POINTER_PARAMETERS = ("inner_weight", "outer_weight", "found_weight", "share_bias")
"""Names of a pointer's parameters: E, C, B and c."""


@dataclass(frozen=True)
class Found:
    """What one memory layer retrieved, as a pointer reads it."""

    retrieved: Retrieved
    """With tokens."""
    weights: Tensor
    """(B, H', T, k), with gradient; 0 where nothing was found."""


class Pointer(nn.Module):
    """Mixes the tokens of retrieved entries into a prediction (formulas above).

    Where a memory is empty or closed the logits stay as they are, bit for bit.
    """

    def __init__(self, model_dim: int, num_heads: int) -> None:
        """Make the parameters of the shares, for so many heads of all memory layers together."""
        super().__init__()
        self.inner_weight = nn.Parameter(torch.empty(_WIDTH, model_dim + 2 * num_heads))
        self.outer_weight = nn.Parameter(torch.empty(1 + num_heads, _WIDTH))
        self.found_weight = nn.Parameter(torch.empty(1 + num_heads, 2 * num_heads))
        self.share_bias = nn.Parameter(torch.empty(1 + num_heads))
        self.start()

    @torch.no_grad()
    def start(self) -> None:
        """Set the parameters: a head has the more to say the more its entries agree. In place."""
        num_heads = len(self.share_bias) - 1
        nn.init.normal_(self.inner_weight, std=1.0 / math.sqrt(self.inner_weight.shape[1]))
        self.outer_weight.zero_()
        self.found_weight.zero_()
        self.found_weight[1:, num_heads:] = _START_AGREEMENT * torch.eye(num_heads)
        self.share_bias.zero_()
        self.share_bias[0] = _START_BIAS

    def forward(
        self, logits: Tensor, hidden: Tensor, layers: Sequence[Found]
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The logits of p, (B, T, V), in the dtype of those given, and each layer's s_h (B, H', T).

        They differ from those given only at tokens that were pointed at. Shares have no gradient.

        Args:
            logits: z (B, T, V).
            hidden: x (B, T, d).
            layers: what each memory layer retrieved.
        """
        wide = torch.promote_types(logits.dtype, torch.float32)
        tokens, weights, scores, is_found = (
            torch.cat(parts, 1).transpose(1, 2)
            for parts in zip(*map(_describe, layers), strict=True)
        )  # (B, T, H, k), the last two (B, T, H)
        weights = weights.to(wide)
        order, pointed = _sum_by_token(tokens, weights)
        agreement = (weights.gather(-1, order) * pointed.sums).sum(-1)
        evidence = torch.cat([scores.to(wide), agreement], -1)
        inputs = torch.cat([hidden.to(wide), _FOUND_SCALE * evidence], -1)
        shares = linear(evidence, self.found_weight.to(wide), self.share_bias.to(wide)) + linear(
            relu(linear(inputs, self.inner_weight.to(wide))), self.outer_weight.to(wide)
        )
        log_shares = torch.cat(
            [shares[..., :1], shares[..., 1:].masked_fill(~is_found, -torch.inf)], -1
        ).log_softmax(-1)
        shares = log_shares[..., 1:].exp()
        amounts = weights * shares.unsqueeze(-1)
        _, all_heads = _sum_by_token(tokens.flatten(2), amounts.flatten(2))
        mixed: Tensor = _Mixture.apply(
            logits, log_shares[..., 0], all_heads.sums, all_heads.tokens, all_heads.is_first
        )
        by_layer = shares.detach().transpose(1, 2).split([f.weights.shape[1] for f in layers], 1)
        return mixed, tuple(by_layer)


def _describe(found: Found) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Tokens, weights, best scores and whether there is any, of one layer."""
    neighbors = found.retrieved.neighbors
    assert found.retrieved.tokens is not None
    is_found = neighbors.valid.any(-1)
    scores = neighbors.scores.masked_fill(~neighbors.valid, -torch.inf).amax(-1)
    return found.retrieved.tokens, found.weights, scores.masked_fill(~is_found, 0.0), is_found


@dataclass(frozen=True)
class _Sums:
    """Sums of weights over equal tokens, sorted by token. Any leading shape, n tokens."""

    tokens: Tensor
    """(..., n) int64."""
    sums: Tensor
    """(..., n): of all that have this token, at every one of them."""
    is_first: Tensor
    """(..., n) bool: the first of equal tokens."""


def _sum_by_token(tokens: Tensor, weights: Tensor) -> tuple[Tensor, _Sums]:
    """The order that sorts the tokens (..., n), and the sums of their weights."""
    tokens, order = tokens.sort(-1)
    is_first = torch.ones_like(tokens, dtype=torch.bool)
    is_first[..., 1:] = tokens[..., 1:] != tokens[..., :-1]
    run = is_first.cumsum(-1) - 1
    sums = torch.zeros_like(weights).scatter_add(-1, run, weights.gather(-1, order))
    return order, _Sums(tokens, sums.gather(-1, run), is_first)


class _Mixture(torch.autograd.Function):
    """z'_w = log(p_w + c_w) - log s_0 + log sum exp z, with p = s_0 softmax(z).

    Where c_w is 0 that is z_w: only tokens with some c are written. The softmax of z' is p + c if
    s_0 and all c sum to 1.
    """

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, log_share: Tensor, amounts: Tensor, tokens: Tensor, first: Tensor
    ) -> Tensor:
        flat = logits.flatten(0, -2)
        log_sum = torch.empty_like(log_share)
        for part in split_rows(flat):
            # One pass; `logsumexp` makes four.
            log_probs = torch.log_softmax(flat[part], -1, dtype=log_sum.dtype)
            log_sum.view(-1)[part] = flat[part, 0].to(log_sum.dtype) - log_probs[:, 0]
        shift = (log_share - log_sum).unsqueeze(-1)
        own = logits.gather(-1, tokens)
        total = torch.exp(own.to(shift.dtype) + shift) + amounts
        total.clamp_(min=torch.finfo(total.dtype).tiny)
        ctx.save_for_backward(logits, amounts, total, tokens, first)
        mixed = torch.where(amounts > 0, (total.log() - shift).to(logits.dtype), own)
        return _write(logits, tokens, mixed)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        logits, amounts, total, tokens, first = ctx.saved_tensors
        at_tokens, pointed = grad.gather(-1, tokens).to(total.dtype), amounts / total
        # What is left of each token's own logit is the same at all that are equal.
        result = _write(grad, tokens, (at_tokens * (1 - pointed)).to(grad.dtype))
        at_tokens.masked_fill_(~first, 0.0)
        of_sum = (at_tokens * pointed).sum(-1)
        flat, out = logits.flatten(0, -2), result.flatten(0, -2)
        scale = of_sum.view(-1, 1).to(out.dtype)
        for part in split_rows(flat):
            out[part].addcmul_(torch.softmax(flat[part], -1), scale[part])
        # Where nothing is pointed no weight changes anything, and 0 must not meet infinity.
        grad_amounts = (at_tokens / total).masked_fill_(amounts == 0, 0.0)
        return result, -of_sum, grad_amounts, None, None


def _write(matrix: Tensor, tokens: Tensor, values: Tensor) -> Tensor:
    """A copy (..., V) with values (..., n) at tokens, equal ones where tokens are equal.

    As `scatter`, which on a CPU takes twice as long to write so little.
    """
    copy = matrix.clone(memory_format=torch.contiguous_format)
    rows = copy.flatten(0, -2)
    line = torch.arange(len(rows), device=rows.device).unsqueeze(1)
    rows[line, tokens.flatten(0, -2)] = values.flatten(0, -2)
    return copy
