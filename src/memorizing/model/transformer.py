"""The paper's decoder: vanilla, sliding window, Transformer-XL or Memorizing Transformer."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding, linear
from torch.utils.checkpoint import checkpoint

from memorizing.config import ModelConfig, check_capacity
from memorizing.errors import ConfigError
from memorizing.index_settings import parse_index
from memorizing.memory import Memory, RetrievalControl, SpreadMemory
from memorizing.model.block import (
    Attention,
    AttentionResult,
    Block,
    MakeAttention,
    Norm,
    Reading,
)
from memorizing.model.layout import Exposed, Layout, ModelState
from memorizing.model.pointer import Found, Pointer
from memorizing.ranks import ALONE, Ranks


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """No dropout, no gradient; the model's mode is restored afterwards."""
    was_training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            yield
    finally:
        model.train(was_training)


_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


@dataclass(frozen=True)
class Retrieval:
    """What one memory layer retrieved in one call. B rows, H heads, T queries, k neighbors.

    Rows whose memory is closed find nothing. Padding is searched for too; nothing reads what it
    finds.
    """

    slots: Tensor
    """(B, H, T, k) int64."""
    positions: Tensor
    """(B, H, T, k) int64: position in its document of the token behind the entry."""
    weights: Tensor
    """(B, H, T, k): softmax weights over the retrieved entries."""
    scores: Tensor
    """(B, H, T, k): by which they were found, larger is nearer."""
    valid: Tensor
    """(B, H, T, k) bool."""
    shares: Tensor | None = None
    """(B, H, T): of the prediction, which the head points with (`model/pointer.py`)."""


@dataclass(frozen=True)
class ModelOutput:
    """Logits of a call and the history after it."""

    logits: Tensor
    """(B, T, vocab_size) in the model's compute dtype."""
    state: ModelState
    retrievals: dict[int, Retrieval] | None = None
    """Per memory layer, where asked for."""
    live: dict[int, Exposed] = field(default_factory=dict)
    """Per memory layer, the entries of this call with their gradient, to expose to a later one."""


class MemorizingTransformer(nn.Module):
    """A decoder-only transformer, some layers of which read an external memory (paper, section 3).

    Weights live here; history lives in a `ModelState` that is passed in and returned. A step over a
    segment:

        state = state.start_documents(batch.doc_start)
        output = model(batch.tokens, state, valid=batch.valid)
        ...                                   # loss, backward
        state = output.state.commit()         # the segment's entries become retrievable

    Parameters are fp32; `compute_dtype` is the dtype of activations and matrix products.
    """

    def __init__(self, config: ModelConfig, make_attention: MakeAttention = Attention) -> None:
        """Make a model with random weights, drawn from torch's global generator.

        Args:
            config: shape and kind.
            make_attention: makes the attention of every layer: another than the paper's is a class
                derived from `model.block.AttentionLayer`. What it reads of the configuration, and
                whether it reads a memory, is its own affair.
        """
        super().__init__()
        self.config = config
        self.compute_dtype = torch.float32
        self.gradient_checkpointing = False
        self.embedding = nn.Embedding(config.vocab_size, config.model_dim)
        self.blocks = nn.ModuleList(
            Block(config, layer in config.memory_layers, make_attention)
            for layer in range(config.num_layers)
        )
        self.final_norm = Norm(config.model_dim)
        self._initialize()
        # Last: it draws too, and a model without it has the same weights otherwise.
        num_heads = config.num_heads * len(config.memory_layers)
        self.pointer = (
            Pointer(config.model_dim, num_heads) if config.pointer and num_heads else None
        )

    def _initialize(self) -> None:
        """Unit embeddings (logits / sqrt(d)), matrices of variance 1 / fan_in, quiet outputs."""
        nn.init.normal_(self.embedding.weight)
        quiet = 1.0 / math.sqrt(2 * self.config.num_layers)
        for module in self.blocks.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=1.0 / math.sqrt(module.in_features))
        for block in self.blocks:
            assert isinstance(block, Block)
            with torch.no_grad():
                block.attention.output.weight.mul_(quiet)
                block.feed_forward.contract.weight.mul_(quiet)
            if self.config.induction_init and block.attention.has_memory:
                block.attention.start_as_induction_heads()

    def init_state(
        self,
        num_rows: int,
        capacity: int | None = None,
        device: torch.device | str | None = None,
        index: str | None = None,
        ranks: Ranks = ALONE,
    ) -> ModelState:
        """An empty history for `num_rows` documents side by side.

        Args:
            num_rows: rows of the batch.
            capacity: entries per row of each memory; None takes the configuration's, 0 turns the
                memory off.
            device: where caches and memories live; by default with the weights.
            index: what searches the memories, as `parse_index` reads it; None takes the
                configuration's.
            ranks: processes that read these rows together, over which each memory is spread.

        Raises:
            ConfigError: a capacity between 1 and num_neighbors - 1, or not a multiple of the ranks,
                or an index that is not known.
            IndexUnavailableError: the index needs a package that is not installed.
        """
        config = self.config
        settings = parse_index(config.index if index is None else index)
        capacity = config.capacity if capacity is None else capacity
        check_capacity(capacity, config.num_neighbors)
        device = self.embedding.weight.device if device is None else torch.device(device)
        num_recent = 1 if config.smear_keys else 2 * max(config.conv_len - 1, 0)
        recent = torch.zeros(
            (num_rows, config.num_heads, num_recent, config.head_dim),
            dtype=self.compute_dtype,
            device=device,
        )
        shape = (num_rows, config.num_heads, capacity, config.head_dim)
        kind = (_DTYPES[config.memory_dtype], device, settings)

        def make_memory() -> Memory:
            if ranks.size == 1:
                return Memory(*shape, *kind, keep_tokens=config.pointer)
            # It has all that a history and this model ask of a memory.
            spread = SpreadMemory(ranks, *shape, *kind, keep_tokens=config.pointer)
            return cast(Memory, spread)

        return ModelState(
            segment_len=config.segment_len,
            position=torch.zeros(num_rows, dtype=torch.int64),
            xl_caches=tuple(
                block.attention.init_cache(num_rows, self.compute_dtype, device)
                for _, block in self._attention_blocks()
            ),
            recent=(recent,) * (config.num_layers if num_recent else 0),
            memories={layer: make_memory() for layer in config.memory_layers if capacity},
        )

    def forward(
        self,
        tokens: Tensor,
        state: ModelState,
        *,
        valid: Tensor | None = None,
        memory_open: Tensor | bool = True,
        restart: Tensor | None = None,
        control: RetrievalControl | None = None,
        return_retrievals: bool = False,
        exposed: Mapping[int, Exposed] | None = None,
    ) -> ModelOutput:
        """Read tokens that follow what the state has read.

        The memories of the state are searched, not changed: the new entries are staged in the
        returned state until `commit`. No gradient flows into caches, staged entries or memories.

        Args:
            tokens: (B, T) int64; no row may cross a boundary of segments.
            state: the history of these rows.
            valid: (B, T) bool; False on padding, right of a row's tokens, which is neither seen nor
                remembered.
            memory_open: (B,) bool or one for all: rows that do not read their memory now (they
                still write).
            restart: (B,) bool: rows that read these tokens as if their document began with them:
                neither their memory nor what local attention saw before. What follows sees all.
            control: retrieval that is wrong on purpose.
            return_retrievals: also return what was retrieved.
            exposed: per memory layer, the entries that the state has staged, with their gradient:
                queries see them beside what they retrieve, and the segment may begin before they
                are committed (crossbatch).

        Raises:
            StateError: a crossed segment boundary, uncommitted entries, other rows than the
                state's, a state that is void since its memories were written.
            ConfigError: a token outside the vocabulary (not checked on CUDA), no token at all, or
                padding before a token.
        """
        self._check_tokens(tokens)
        exposed = exposed or {}
        is_open = torch.as_tensor(memory_open).cpu().expand(tokens.shape[0])
        if restart is not None:
            restart = restart.cpu()
            is_open = is_open & ~restart
        layout = Layout.build(
            self.config, state, tokens, valid, restart=restart, may_wait=bool(exposed)
        )
        x = embedding(tokens, self.embedding.weight).to(self.compute_dtype)
        results: list[AttentionResult] = []
        for layer, block in enumerate(self.blocks):
            memory = state.memories.get(layer)
            arguments = (
                x,
                layout,
                state.xl_caches[layer],
                state.recent[layer] if state.recent else None,
                None
                if memory is None
                else Reading(
                    memory, is_open, control, memory.num_changes.clone(), exposed.get(layer)
                ),
            )
            if self.gradient_checkpointing and torch.is_grad_enabled():
                x, result = checkpoint(block, *arguments, use_reentrant=False)  # type: ignore[misc]
            else:
                x, result = block(*arguments)
            results.append(result)
        weight = self.embedding.weight.to(x.dtype)
        x = self.final_norm(x)
        logits = linear(x / math.sqrt(self.config.model_dim), weight)
        found = {
            layer: Found(result.retrieved, result.weights)
            for layer, result in enumerate(results)
            if result.retrieved is not None and result.weights is not None
        }
        shares: Sequence[Tensor | None] = [None] * len(found)
        if self.pointer is not None and found:
            logits, shares = self.pointer(logits, x, list(found.values()))
        entries = {
            layer: replace(result.live, tokens=tokens if self.pointer is not None else None)
            for layer, result in enumerate(results)
            if result.live is not None
        }
        next_state = state.advance(
            layout.valid,
            entries,
            recent=tuple(r.recent for r in results if r.recent is not None),
            xl_caches=tuple(result.cache for result in results),
        )
        retrievals = self._describe(state, found, shares, control) if return_retrievals else None
        live = {
            layer: Exposed(result.live.keys, result.live.values, layout.valid)
            for layer, result in enumerate(results)
            if result.live is not None and layer in state.memories
        }
        return ModelOutput(logits, next_state, retrievals, live)

    def _check_tokens(self, tokens: Tensor) -> None:
        if tokens.numel() and not tokens.is_cuda:
            low, high = (int(bound) for bound in tokens.aminmax())
            if low < 0 or high >= self.config.vocab_size:
                raise ConfigError(
                    f"tokens run from {low} to {high}; the model's vocabulary has 0 to "
                    f"{self.config.vocab_size - 1}; "
                    "use the tokenizer the model was trained with"
                )

    @staticmethod
    def _describe(
        state: ModelState,
        found: Mapping[int, Found],
        shares: Sequence[Tensor | None],
        control: RetrievalControl | None,
    ) -> dict[int, Retrieval]:
        donors = None if control is None else control.donor_rows
        described = {}
        for (layer, one), of_prediction in zip(found.items(), shares, strict=True):
            neighbors = one.retrieved.neighbors
            described[layer] = Retrieval(
                neighbors.slots,
                state.memories[layer].compute_positions(neighbors.slots, donors),
                one.weights.detach(),
                neighbors.scores.detach(),
                neighbors.valid,
                of_prediction,
            )
        return described

    def gates(self) -> dict[int, Tensor]:
        """Gate per head of every memory layer, 1 = memory only; empty with the joint softmax."""
        return {
            layer: torch.sigmoid(block.attention.gate_bias.detach())
            for layer, block in self._attention_blocks()
            if block.attention.gate_bias is not None
        }

    def memory_parameters(self) -> list[nn.Parameter]:
        """Gates, what empty memories give, scales: an optimizer group without weight decay."""
        parameters = []
        for _, block in self._attention_blocks():
            mine = block.attention
            parameters += [
                p for p in (mine.gate_bias, mine.empty_value, mine.scale) if p is not None
            ]
        return parameters

    def _attention_blocks(self) -> list[tuple[int, Block]]:
        return [
            (layer, block) for layer, block in enumerate(self.blocks) if isinstance(block, Block)
        ]
