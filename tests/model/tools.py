"""Small models and readers for the tests of the model. Sizes are different primes."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from memorizing.config import ModelConfig
from memorizing.model import MemorizingTransformer, ModelState

SMALL = ModelConfig(
    vocab_size=29,
    num_layers=3,
    model_dim=22,
    num_heads=2,
    head_dim=11,
    ffn_dim=37,
    segment_len=7,
    window=7,
    xl_cache=True,
    memory_layers=(1,),
    capacity=17,
    num_neighbors=3,
    smear_keys=True,
    num_buckets=6,
    max_distance=5,
    memory_dtype="float32",
)


def make_model(
    seed: int = 0, dtype: torch.dtype = torch.float64, **changes: object
) -> MemorizingTransformer:
    """A model whose parameters are all away from their starting values."""
    torch.manual_seed(seed)
    model = MemorizingTransformer(replace(SMALL, **changes)).to(dtype)  # type: ignore[arg-type]
    model.compute_dtype = dtype
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    return model


def make_tokens(num_rows: int, num_tokens: int, seed: int = 1, vocab_size: int = 29) -> Tensor:
    """Random tokens (num_rows, num_tokens)."""
    return torch.randint(
        vocab_size, (num_rows, num_tokens), generator=torch.Generator().manual_seed(seed)
    )


def read(
    model: MemorizingTransformer,
    tokens: Tensor,
    capacity: int | None = None,
    chunk_len: int | None = None,
    state: ModelState | None = None,
) -> tuple[Tensor, ModelState]:
    """Logits of whole documents read in chunks (default: a segment), and the last state."""
    state = model.init_state(len(tokens), capacity) if state is None else state
    chunk_len = model.config.segment_len if chunk_len is None else chunk_len
    logits = []
    start = 0
    while start < tokens.shape[1]:
        to_boundary = model.config.segment_len - int(state.position[0]) % model.config.segment_len
        stop = min(tokens.shape[1], start + min(chunk_len, to_boundary))
        output = model(tokens[:, start:stop], state)
        logits.append(output.logits)
        state = output.state.commit()
        start = stop
    return torch.cat(logits, 1), state
