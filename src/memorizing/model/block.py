"""One layer: attention over the local context and, where told, a memory; then a feed-forward.

Shapes: B rows, H heads, T tokens, S = C + T keys (C cached), D head_dim, d model_dim.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import dropout, linear, relu

from memorizing.config import ModelConfig
from memorizing.errors import StateError
from memorizing.memory import Memory, Retrieved
from memorizing.model.layout import Layout
from memorizing.model.local_attention import attend_locally
from memorizing.model.memory_attention import attend_to_retrieved, combine_by_gate, combine_jointly
from memorizing.model.position_bias import PositionBias
from memorizing.model.state import Entries, RetrievalControl

_INDUCTION_SMEAR = -2.0
"""The logit of a token's share in its own key, 0.12: the key is mostly the previous token's."""


@dataclass(frozen=True)
class Reading:
    """How a layer reads its memory in one call."""

    memory: Memory
    is_open: Tensor
    """(B,) bool on the CPU: rows that read it."""
    control: RetrievalControl | None
    num_changes: Tensor
    """() int64 on the CPU: the memory's counter when the call began, a copy. Gradient checkpointing
    reads a second time in the backward pass and must find the same memory."""


@dataclass(frozen=True)
class AttentionResult:
    """Output of the attention and what the state keeps of it."""

    output: Tensor
    """(B, T, d)."""
    cache: Entries
    staged: Entries | None
    """The new tokens' entries, in memory layers."""
    previous_key: Tensor | None
    retrieved: Retrieved | None
    weights: Tensor | None


class Norm(nn.Module):
    """Root-mean-square norm with a learned gain (Zhang and Sennrich 2019)."""

    def __init__(self, dim: int) -> None:
        """Start with a gain of 1."""
        super().__init__()
        self.gain = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        """Divide by the root mean square over the last dimension, then multiply by the gain."""
        return nn.functional.rms_norm(x, self.gain.shape, self.gain.to(x.dtype), 1e-6)


def _project(x: Tensor, weight: Tensor) -> Tensor:
    """X W^T in the dtype of x: weights stay fp32 and are rounded where they are used."""
    return linear(x, weight.to(x.dtype))


class Attention(nn.Module):
    """Multi-head attention with normalized queries and keys, T5 bias, cache and memory."""

    def __init__(self, config: ModelConfig, has_memory: bool) -> None:
        """Make the parameters: projections, position bias, scale, smear and gate as configured."""
        super().__init__()
        self.config = config
        inner = config.num_heads * config.head_dim
        self.query = nn.Linear(config.model_dim, inner, bias=False)
        self.key = nn.Linear(config.model_dim, inner, bias=False)
        self.value = nn.Linear(config.model_dim, inner, bias=False)
        self.output = nn.Linear(inner, config.model_dim, bias=False)
        self.position_bias = PositionBias(
            config.num_heads, config.num_buckets, config.max_distance, config.window
        )

        def make_per_head(wanted: bool, start: float) -> nn.Parameter | None:
            return nn.Parameter(torch.full((config.num_heads,), float(start))) if wanted else None

        self.scale = make_per_head(
            config.normalize_qk, config.scale_init or math.sqrt(config.head_dim)
        )
        self.smear = make_per_head(config.smear_keys, 0.0)
        by_gate = has_memory and config.combine == "gate"
        self.gate_bias = make_per_head(by_gate, config.gate_bias_init)
        self.has_memory = has_memory

    def start_as_induction_heads(self) -> None:
        """Set the weights so that every head is an induction head (Olsson et al. 2022). In place.

        Equal projections of queries and keys let a token find tokens like it: by a random
        projection of what it is and what came before it. A key smeared towards the token before
        makes the entry that is found the one *after* the like token, whose value says what comes
        next. Only the start is set: projections and smears are learned apart.
        """
        assert self.smear is not None
        with torch.no_grad():
            self.key.weight.copy_(self.query.weight)
            self.smear.fill_(_INDUCTION_SMEAR)

    def forward(
        self,
        x: Tensor,
        layout: Layout,
        cache: Entries,
        previous_key: Tensor | None,
        reading: Reading | None,
    ) -> AttentionResult:
        """Attend from the tokens x (B, T, d) to their local context and memory."""
        config = self.config
        queries, new_keys, new_values = (
            _project(x, part.weight)
            .unflatten(-1, (config.num_heads, config.head_dim))
            .transpose(1, 2)
            for part in (self.query, self.key, self.value)
        )
        last_key = None
        if self.smear is not None and previous_key is not None:
            last_key = layout.keep_last(new_keys, previous_key)
            new_keys = self._smear(new_keys, previous_key, layout)
        if self.scale is None:
            search_queries = scaled_queries = queries / math.sqrt(config.head_dim)
        else:
            search_queries = normalize(queries)
            scaled_queries = search_queries * self.scale.to(x.dtype).view(-1, 1, 1)
            new_keys = normalize(new_keys)
        keys = torch.cat([cache.keys, new_keys], 2)
        values = torch.cat([cache.values, new_values], 2)
        by_joint = self.has_memory and config.combine == "joint"
        local, local_log_sum = attend_locally(
            scaled_queries,
            keys,
            values,
            self._compute_bias(layout, x),
            layout.num_hidden_keys if layout.distances is None else (),
            num_frozen_keys=cache.keys.shape[2],
            need_log_sum=by_joint and reading is not None,
        )
        retrieved = weights = None
        if reading is not None and bool(reading.is_open.any()):
            retrieved = self._retrieve(search_queries, layout, reading)
            memory, weights, memory_log_sum = attend_to_retrieved(
                scaled_queries, retrieved, self.scale
            )
            found = retrieved.neighbors.valid.any(-1)
            if self.gate_bias is not None:
                local = combine_by_gate(local, memory, self.gate_bias, found)
            elif local_log_sum is not None:
                local = combine_jointly(local, memory, local_log_sum, memory_log_sum, found)
        output = _project(local.transpose(1, 2).flatten(2), self.output.weight)
        staged = Entries(new_keys.detach(), new_values.detach()) if self.has_memory else None
        kept = Entries(layout.keep(keys), layout.keep(values))
        return AttentionResult(output, kept, staged, last_key, retrieved, weights)

    def _smear(self, keys: Tensor, previous_key: Tensor, layout: Layout) -> Tensor:
        """k_t := s k_t + (1 - s) k_(t-1), s = sigmoid of one scalar per head (Olsson et al. 2022).

        The first key of a document has no predecessor and stays as it is.
        """
        at_start = (layout.query_position[:, 0] == 0).to(keys.device).view(-1, 1, 1)
        if layout.first_valid is None:
            first = torch.where(at_start, keys[:, :, 0], previous_key)
            previous = torch.cat([first.unsqueeze(2), keys[:, :, :-1]], 2)
        else:
            rows = torch.arange(keys.shape[0], device=keys.device)
            first = torch.where(at_start, keys[rows, :, layout.first_valid], previous_key)
            shifted = torch.cat([keys[:, :, :1], keys[:, :, :-1]], 2)
            is_first = torch.arange(
                keys.shape[2], device=keys.device
            ) == layout.first_valid.unsqueeze(1)
            previous = torch.where(is_first[:, None, :, None], first.unsqueeze(2), shifted)
        assert self.smear is not None
        share = torch.sigmoid(self.smear).to(keys.dtype).view(-1, 1, 1)
        return torch.lerp(previous, keys, share)

    def _compute_bias(self, layout: Layout, x: Tensor) -> Tensor:
        if layout.distances is not None:
            return self.position_bias.look_up(layout.distances, x.dtype)
        return self.position_bias(x.shape[1], x.dtype)

    def _retrieve(self, queries: Tensor, layout: Layout, reading: Reading) -> Retrieved:
        config, control = self.config, reading.control
        if not torch.equal(reading.memory.num_changes, reading.num_changes):
            raise StateError(
                "the memory was written between the forward pass and its repetition by gradient "
                "checkpointing; call commit() and start_documents() after backward()"
            )
        num_hidden = None
        if config.combine == "joint" and config.xl_cache:
            # One softmax must not count a token twice: leave out the entries that local attention
            # sees.
            offset = layout.query_position % config.segment_len
            num_hidden = (config.window - 1 - offset).clamp(min=0)
        shuffled = control is not None and control.shuffle_values
        return reading.memory.retrieve(
            queries,
            config.num_neighbors,
            num_hidden=num_hidden,
            donor_rows=None if control is None else control.donor_rows,
            value_seed=control.seed if control is not None and shuffled else None,
            is_open=reading.is_open,
        )


def normalize(x: Tensor) -> Tensor:
    """Divide by the L2 norm over the last dimension (Henry et al. 2020)."""
    return nn.functional.normalize(x, dim=-1)


class FeedForward(nn.Module):
    """relu(x W_1) W_2, without biases."""

    def __init__(self, config: ModelConfig) -> None:
        """Make the two matrices."""
        super().__init__()
        self.expand = nn.Linear(config.model_dim, config.ffn_dim, bias=False)
        self.contract = nn.Linear(config.ffn_dim, config.model_dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, d) to (B, T, d)."""
        return _project(relu(_project(x, self.expand.weight)), self.contract.weight)


class Block(nn.Module):
    """Pre-norm residual block: x + attention(norm(x)), then x + feed_forward(norm(x))."""

    def __init__(self, config: ModelConfig, has_memory: bool) -> None:
        """Make a layer; `has_memory` for those that read the external memory."""
        super().__init__()
        self.attention_norm = Norm(config.model_dim)
        self.attention = Attention(config, has_memory)
        self.feed_forward_norm = Norm(config.model_dim)
        self.feed_forward = FeedForward(config)
        self.dropout = config.dropout

    def forward(
        self,
        x: Tensor,
        layout: Layout,
        cache: Entries,
        previous_key: Tensor | None,
        reading: Reading | None,
    ) -> tuple[Tensor, AttentionResult]:
        """The layer's output (B, T, d), and what the state keeps of its attention."""
        result = self.attention(self.attention_norm(x), layout, cache, previous_key, reading)
        x = x + dropout(result.output, self.dropout, self.training)
        x = x + dropout(self.feed_forward(self.feed_forward_norm(x)), self.dropout, self.training)
        return x, result
