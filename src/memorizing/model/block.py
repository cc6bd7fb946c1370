"""One layer: attention over the local context and, where told, a memory; then a feed-forward.

Queries and keys may be mixed with those of the tokens before them (`mixing.py`).

Shapes: B rows, H heads, T tokens, P tokens before them, S = C + T keys (C cached), D head_dim, d
model_dim.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.functional import dropout, linear, relu

from memorizing.config import ModelConfig
from memorizing.devices import send
from memorizing.errors import StateError
from memorizing.memory import Entries, Memory, RetrievalControl, Retrieved
from memorizing.memory.history import count_hidden
from memorizing.model.attention import (
    PositionBias,
    attend_locally,
    attend_to_retrieved,
    combine_by_gate,
    combine_jointly,
)
from memorizing.model.layout import Exposed, Layout, attend_to_exposed
from memorizing.model.mixing import (
    ShortConvolution,
    extend_back,
    keep_recent,
    smear,
    start_as_induction,
)
from memorizing.model.pointer import POINTER_PARAMETERS

_INDUCTION_SMEAR = -2.0
"""The logit of a token's share in its own key, 0.12: the key is mostly the previous token's."""
_QUERY_TAPS, _KEY_TAPS = (1.0,), (0.5, 0.5)
"""Where short convolutions start: queries as they are, keys half the previous token's."""


@dataclass(frozen=True)
class Reading:
    """How a layer reads its memory in one call."""

    memory: Memory
    is_open: Tensor
    """(B,) bool on the CPU: rows that read it."""
    control: RetrievalControl | None
    num_changes: Tensor
    """(B,) int64 on the CPU: the memory's counter when the call began, a copy. Gradient
    checkpointing reads a second time in the backward pass and must find the same memory."""
    exposed: Exposed | None = None
    """Entries that are seen with gradient, beside the memory's."""


@dataclass(frozen=True)
class AttentionResult:
    """Output of the attention and what the state keeps of it."""

    output: Tensor
    """(B, T, d)."""
    cache: Entries
    live: Entries | None
    """The new tokens' entries, in memory layers, with gradient."""
    recent: Tensor | None
    """(B, H, P, D): the last tokens' raw keys, or queries and keys, where they are mixed."""
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


@dataclass(frozen=True)
class Projected:
    """What attention compares and sums, of the tokens of a call."""

    queries: Tensor
    """(B, H, T, D), as memories are searched with them: mixed, normalized or divided."""
    scaled_queries: Tensor
    """(B, H, T, D): their products with keys are the scores."""
    keys: Tensor
    """(B, H, T, D), mixed and normalized."""
    values: Tensor
    recent: Tensor | None
    """The next call's."""


class AttentionLayer(nn.Module, ABC):
    """The weights of an attention, and what it shares with every other one in their place.

    A subclass says what the queries attend to, and what of it the state keeps from one call to the
    next: `MemorizingTransformer(config, make_attention)` has it in every layer.
    """

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
        if has_memory and not config.memory_layer_bias:
            self.position_bias.table.requires_grad_(False)  # it starts at 0

        def make_per_head(wanted: bool, start: float) -> nn.Parameter | None:
            return nn.Parameter(torch.full((config.num_heads,), float(start))) if wanted else None

        self.scale = make_per_head(
            config.normalize_qk, config.scale_init or math.sqrt(config.head_dim)
        )
        self.smear = make_per_head(config.smear_keys, 0.0)
        self.mix_queries, self.mix_keys = (
            ShortConvolution(config.conv_len, config.num_heads, config.head_dim, taps)
            if config.conv_len
            else None
            for taps in (_QUERY_TAPS, _KEY_TAPS)
        )
        by_gate = has_memory and config.combine == "gate"
        self.gate_bias = make_per_head(by_gate, config.gate_bias_init)
        self.empty_value = (
            nn.Parameter(torch.zeros(config.num_heads, config.head_dim))
            if by_gate and config.empty_value
            else None
        )
        self.has_memory = has_memory

    @property
    def num_kept(self) -> int:
        """Keys and values that the state keeps of this layer before any token."""
        return 0

    def init_cache(self, num_rows: int, dtype: torch.dtype, device: torch.device) -> Entries:
        """What the state keeps of this layer before any token: (B, H, num_kept, D), or like it.

        Later ones may differ in their number and in nothing else. A row that begins a document
        (`layout.at_start`, or `layout.position` 0) may have another document's here: nothing of it
        counts. So it is with what a row that restarts (`training.restart_share`) has of its own.
        """
        shape = (num_rows, self.config.num_heads, self.num_kept, self.config.head_dim)
        keys, values = (torch.zeros(shape, dtype=dtype, device=device) for _ in range(2))
        return Entries(keys, values)

    @abstractmethod
    def forward(
        self,
        x: Tensor,
        layout: Layout,
        cache: Entries,
        recent: Tensor | None,
        reading: Reading | None,
    ) -> AttentionResult:
        """Attend from the tokens x (B, T, d) to what is kept and to one another.

        Args:
            x: normalized.
            layout: of the call: positions in the documents, and padding on the right.
            cache: what this layer's last result held.
            recent: likewise, for `project`.
            reading: how to read the layer's memory, where it has one.
        """

    def start_as_induction_heads(self) -> None:
        """Set the weights so that every head is an induction head (Olsson et al. 2022). In place.

        Equal projections of queries and keys let a token find tokens like it: by a random
        projection of what it is and what came before it. A key mixed with the token before makes
        the entry that is found the one *after* the like token, whose value says what comes next; a
        longer mixture compares several tokens. Only the start is set: queries and keys are learned
        apart.
        """
        with torch.no_grad():
            self.key.weight.copy_(self.query.weight)
            if self.smear is not None:
                self.smear.fill_(_INDUCTION_SMEAR)
        if self.mix_queries is not None and self.mix_keys is not None:
            start_as_induction(self.mix_queries, self.mix_keys)

    def project(self, x: Tensor, layout: Layout, recent: Tensor | None) -> Projected:
        """Queries, keys and values of x (B, T, d), mixed with those of the tokens before."""
        config = self.config
        queries, keys, values = (
            _project(x, part.weight)
            .unflatten(-1, (config.num_heads, config.head_dim))
            .transpose(1, 2)
            for part in (self.query, self.key, self.value)
        )
        if recent is not None:
            queries, keys, recent = self._mix(queries, keys, recent, layout)
        if self.scale is None:
            queries = scaled = queries / math.sqrt(config.head_dim)
        else:
            queries, keys = normalize(queries), normalize(keys)
            scaled = queries * self.scale.to(x.dtype).view(-1, 1, 1)
        return Projected(queries, scaled, keys, values, recent)

    def project_output(self, attended: Tensor) -> Tensor:
        """(B, T, d) from what every head attended to (B, H, T, D)."""
        return _project(attended.transpose(1, 2).flatten(2), self.output.weight)

    def _mix(
        self, queries: Tensor, keys: Tensor, recent: Tensor, layout: Layout
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Mix queries and keys with those of the tokens before; also the next call's `recent`."""
        if self.smear is not None:
            extended = extend_back(keys, recent, layout)
            mixed = smear(extended, torch.sigmoid(self.smear), layout)
            return queries, mixed, keep_recent(extended, 1, layout)
        assert self.mix_queries is not None
        assert self.mix_keys is not None
        before = recent.chunk(2, dim=2)
        num_before = before[0].shape[2]
        both = [extend_back(x, r, layout) for x, r in zip((queries, keys), before, strict=True)]
        kept = torch.cat([keep_recent(x, num_before, layout) for x in both], 2)
        return self.mix_queries(both[0]), self.mix_keys(both[1]), kept


class Attention(AttentionLayer):
    """Multi-head attention with normalized queries and keys, T5 bias, cache and memory."""

    def forward(
        self,
        x: Tensor,
        layout: Layout,
        cache: Entries,
        recent: Tensor | None,
        reading: Reading | None,
    ) -> AttentionResult:
        """Attend from the tokens x (B, T, d) to their local context and memory."""
        config, new = self.config, self.project(x, layout, recent)
        queries = new.scaled_queries
        keys = torch.cat([cache.keys, new.keys], 2)
        values = torch.cat([cache.values, new.values], 2)
        by_joint = self.has_memory and config.combine == "joint"
        local, local_log_sum = attend_locally(
            queries,
            keys,
            values,
            self.position_bias(x.shape[1], x.dtype),
            layout.num_hidden_keys,
            num_frozen_keys=cache.keys.shape[2],
            need_log_sum=by_joint and reading is not None,
        )
        retrieved = weights = None
        if reading is not None and bool(reading.is_open.any()):
            num_hidden = None
            if by_joint and config.xl_cache:
                num_hidden = count_hidden(layout.position, config.segment_len, config.window)
            retrieved = self._retrieve(new.queries, num_hidden, reading)
            memory, weights, memory_log_sum = attend_to_retrieved(queries, retrieved, self.scale)
            found = retrieved.neighbors.valid.any(-1)
            if reading.exposed is not None:
                seen, seen_log_sum = attend_to_exposed(queries, reading.exposed, num_hidden)
                memory = combine_jointly(seen, memory, seen_log_sum, memory_log_sum, found)
                memory_log_sum = torch.logaddexp(memory_log_sum, seen_log_sum)
                found = send(reading.is_open, x.device).view(-1, 1, 1).expand_as(found)
            if self.gate_bias is not None:
                local = combine_by_gate(local, memory, self.gate_bias, found, self.empty_value)
            elif local_log_sum is not None:
                local = combine_jointly(local, memory, local_log_sum, memory_log_sum, found)
        elif self.gate_bias is not None and self.empty_value is not None and config.has_memory:
            nothing = torch.zeros(local.shape[:3], dtype=torch.bool, device=x.device)
            local = combine_by_gate(local, local, self.gate_bias, nothing, self.empty_value)
        live = Entries(new.keys, new.values) if self.has_memory else None
        kept = Entries(layout.keep(keys), layout.keep(values))
        output = self.project_output(local)
        return AttentionResult(output, kept, live, new.recent, retrieved, weights)

    def _retrieve(self, queries: Tensor, num_hidden: Tensor | None, reading: Reading) -> Retrieved:
        config, control = self.config, reading.control
        if not torch.equal(reading.memory.num_changes, reading.num_changes):
            raise StateError(
                "the memory was written between the forward pass and its repetition by gradient "
                "checkpointing; call commit() and start_documents() after backward()"
            )
        if num_hidden is not None and reading.exposed is not None:
            # The newest tokens are exposed, and not in the memory yet.
            num_exposed = reading.exposed.valid.sum(1, keepdim=True)
            num_hidden = (num_hidden - num_exposed).clamp(min=0)
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


def is_of_memory(name: str) -> bool:
    """Whether a model lacks the parameter of this name where it mixes in memory in another way."""
    return name.rpartition(".")[2] in ("gate_bias", "empty_value", *POINTER_PARAMETERS)


MakeAttention: TypeAlias = Callable[[ModelConfig, bool], AttentionLayer]
"""A layer's attention, from the configuration and whether the layer has a memory."""


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

    def __init__(
        self, config: ModelConfig, has_memory: bool, make_attention: MakeAttention = Attention
    ) -> None:
        """Make a layer; `has_memory` for those that read the external memory."""
        super().__init__()
        self.attention_norm = Norm(config.model_dim)
        self.attention = make_attention(config, has_memory)
        self.feed_forward_norm = Norm(config.model_dim)
        self.feed_forward = FeedForward(config)
        self.dropout = config.dropout

    def forward(
        self,
        x: Tensor,
        layout: Layout,
        cache: Entries,
        recent: Tensor | None,
        reading: Reading | None,
    ) -> tuple[Tensor, AttentionResult]:
        """The layer's output (B, T, d), and what the state keeps of its attention."""
        result = self.attention(self.attention_norm(x), layout, cache, recent, reading)
        x = x + dropout(result.output, self.dropout, self.training)
        x = x + dropout(self.feed_forward(self.feed_forward_norm(x)), self.dropout, self.training)
        return x, result
