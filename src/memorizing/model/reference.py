"""The paper's formulas, token by token: slow, plain, and the oracle of the tests.

Reads one document at a time, layer by layer, with Python loops over tokens and heads. It shares the
parameters of a `MemorizingTransformer` and nothing else: no cache, no ring, no search, no mask.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from memorizing.config import ModelConfig
from memorizing.model.block import AttentionLayer, Block
from memorizing.model.pointer import Pointer
from memorizing.model.transformer import MemorizingTransformer


def compute_reference_logits(model: MemorizingTransformer, tokens: Tensor, capacity: int) -> Tensor:
    """Logits (n, vocab_size) of a document of n tokens; `capacity` 0 is no memory.

    Gradients are those of training segment by segment: none through keys and values from before a
    token's own segment. Stored entries are not rounded, so compare with a model whose
    `memory_dtype` is float32.
    """
    x = model.embedding.weight[tokens]
    found: list[list[_Nearest]] = [[] for _ in tokens]
    for block in model.blocks:
        assert isinstance(block, Block)
        attended, nearest = _attend(
            block.attention, _norm(x, block.attention_norm.gain), model.config, capacity
        )
        x = x + attended
        found = [before + new for before, new in zip(found, nearest, strict=True)]
        hidden = torch.relu(
            _norm(x, block.feed_forward_norm.gain) @ block.feed_forward.expand.weight.T
        )
        x = x + hidden @ block.feed_forward.contract.weight.T
    x = _norm(x, model.final_norm.gain)
    logits = x @ model.embedding.weight.T / math.sqrt(model.config.model_dim)
    if model.pointer is None:
        return logits
    rows = [
        _point(model.pointer, *of_token, tokens) for of_token in zip(logits, x, found, strict=True)
    ]
    return torch.stack(rows)


@dataclass(frozen=True)
class _Nearest:
    """What one head retrieved for one token; empty where it found nothing, or has no memory."""

    entries: list[int]
    weights: list[Tensor]
    best: float


def _point(
    pointer: Pointer, logits: Tensor, x: Tensor, heads: list[_Nearest], tokens: Tensor
) -> Tensor:
    """Logits (V,) of the mixture, up to a constant; `heads` are those of all memory layers."""
    if not any(head.entries for head in heads):
        return logits
    pointed, best, agreement = [], [], []
    for head in heads:
        p = torch.zeros_like(logits)
        for entry, weight in zip(head.entries, head.weights, strict=True):
            p = p + weight * torch.eye(len(logits), dtype=logits.dtype)[tokens[entry]]
        pointed.append(p)
        best.append(logits.new_tensor(head.best))
        agreement.append((p * p).sum())
    evidence = torch.stack(best + agreement)
    inner = torch.relu(pointer.inner_weight @ torch.cat([x, evidence / 4]))
    shares = pointer.found_weight @ evidence + pointer.share_bias + pointer.outer_weight @ inner
    is_out = torch.tensor([False] + [not head.entries for head in heads])
    shares = torch.softmax(shares.masked_fill(is_out, -torch.inf), 0)
    p = shares[0] * torch.softmax(logits, 0)
    for share, of_head in zip(shares[1:], pointed, strict=True):
        p = p + share * of_head
    return torch.log(p) - torch.log(shares[0]) + torch.logsumexp(logits, 0)


def _norm(x: Tensor, gain: Tensor) -> Tensor:
    return x / torch.sqrt((x * x).mean(-1, keepdim=True) + 1e-6) * gain


def _attend(
    attention: AttentionLayer, x: Tensor, config: ModelConfig, capacity: int
) -> tuple[Tensor, list[list[_Nearest]]]:
    """Output (n, d), and for every token what the heads of a memory layer retrieved."""
    num_tokens = len(x)
    q, k, v = (
        (x @ part.weight.T).view(num_tokens, config.num_heads, config.head_dim)
        for part in (attention.query, attention.key, attention.value)
    )
    if attention.smear is not None:
        k = _smear(k, torch.sigmoid(attention.smear), config.segment_len)
    if attention.mix_queries is not None and attention.mix_keys is not None:
        q = _convolve(q, attention.mix_queries.coefficients, config.segment_len)
        k = _convolve(k, attention.mix_keys.coefficients, config.segment_len)
    if attention.scale is not None:
        q = q / q.norm(dim=-1, keepdim=True)
        k = k / k.norm(dim=-1, keepdim=True)
    rows, found = [], []
    for t in range(num_tokens):
        heads, nearest = [], []
        for h in range(config.num_heads):
            scale = (
                attention.scale[h]
                if attention.scale is not None
                else torch.tensor(config.head_dim**-0.5)
            )
            value, retrieved = _attend_one(
                attention, config, capacity, q[:, h], k[:, h], v[:, h], scale, t, h
            )
            heads.append(value)
            nearest.append(retrieved)
        rows.append(torch.cat(heads))
        found.append(nearest if attention.has_memory else [])
    return torch.stack(rows) @ attention.output.weight.T, found


def _attend_one(
    attention: AttentionLayer,
    config: ModelConfig,
    capacity: int,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: Tensor,
    t: int,
    h: int,
) -> tuple[Tensor, _Nearest]:
    """Result (D,) of head h for token t, and what it retrieved."""
    nothing = _Nearest([], [], 0.0)
    segment_start = t // config.segment_len * config.segment_len
    first = max(0, t - config.window + 1)
    if not config.xl_cache:
        first = max(first, segment_start)
    local_scores, local_values = [], []
    for j in range(first, t + 1):
        # Keys and values of earlier segments come from the cache: no gradient.
        key, value = (k[j], v[j]) if j >= segment_start else (k[j].detach(), v[j].detach())
        bias = attention.position_bias.table[h, _bucket(t - j, config)]
        local_scores.append(scale * (q[t] @ key) + bias)
        local_values.append(value)
    scores = torch.stack(local_scores)
    local = torch.softmax(scores, 0) @ torch.stack(local_values)
    if not attention.has_memory or not config.has_memory:
        return local, nothing

    oldest = max(0, segment_start - capacity)
    newest = segment_start
    if config.combine == "joint" and config.xl_cache:
        newest = min(newest, first)  # what local attention sees is left out before the top k
    entries = list(range(oldest, newest))
    # Nearest first; of equal scores the newest entry first.
    entries.sort(key=lambda j: (-float(q[t].detach() @ k[j].detach()), -j))
    nearest = entries[: config.num_neighbors]
    if not nearest:
        if attention.empty_value is None:
            return local, nothing
        gate = torch.sigmoid(attention.gate_bias[h])  # type: ignore[index]
        return gate * attention.empty_value[h] + (1 - gate) * local, nothing
    memory_scores = torch.stack([scale * (q[t] @ k[j].detach()) for j in nearest])
    memory_values = torch.stack([v[j].detach() for j in nearest])
    weights = torch.softmax(memory_scores, 0)
    # As it is searched with: normalized, or divided by sqrt(head_dim).
    searched = q[t].detach() * (1.0 if attention.scale is not None else float(scale))
    best = max(float(searched @ k[j].detach()) for j in nearest)
    found = _Nearest(nearest, list(weights), best)
    if config.combine == "joint":
        joint = torch.softmax(torch.cat([scores, memory_scores]), 0)
        return joint @ torch.cat([torch.stack(local_values), memory_values]), found
    gate = torch.sigmoid(attention.gate_bias[h])  # type: ignore[index]
    return gate * (weights @ memory_values) + (1 - gate) * local, found


def _smear(k: Tensor, share: Tensor, segment_len: int) -> Tensor:
    """Mix every key (n, H, D) with the one before; the first stays as it is."""
    mixed = [k[0]]
    for t in range(1, len(k)):
        before = k[t - 1].detach() if t % segment_len == 0 else k[t - 1]
        mixed.append(share.unsqueeze(-1) * k[t] + (1 - share.unsqueeze(-1)) * before)
    return torch.stack(mixed)


def _convolve(x: Tensor, coefficients: Tensor, segment_len: int) -> Tensor:
    """Sum over taps j of c_j * x_(t-j), of x (n, H, D); before the document there is nothing."""
    mixed = []
    for t in range(len(x)):
        start = t // segment_len * segment_len
        parts = [
            coefficients[j] * (x[t - j] if t - j >= start else x[t - j].detach())
            for j in range(min(len(coefficients), t + 1))
        ]
        mixed.append(torch.stack(parts).sum(0))
    return torch.stack(mixed)


def _bucket(distance: int, config: ModelConfig) -> int:
    """T5's causal bucket: exact up to half of the buckets, then logarithmic up to max_distance."""
    num_exact = config.num_buckets // 2
    if distance < num_exact:
        return distance
    share = math.log(distance / num_exact) / math.log(config.max_distance / num_exact)
    return min(config.num_buckets - 1, num_exact + int(share * (config.num_buckets - num_exact)))
