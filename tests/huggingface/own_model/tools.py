"""A small model of ours in the ecosystem. Sizes are different primes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from memorizing.huggingface.own_model.model import (
    MemorizingTransformerConfig,
    MemorizingTransformerForCausalLM,
)
from memorizing.huggingface.releases import CACHE_NAME
from memorizing.model import MemorizingTransformer

from ...model.tools import SMALL

VOCAB_SIZE = SMALL.vocab_size
SEGMENT_LEN = SMALL.segment_len


def make_own(
    seed: int = 0, loudness: float = 1.0, **changes: object
) -> MemorizingTransformerForCausalLM:
    """A model whose parameters are all away from their starting values.

    With a `loudness` of more than 1 its layers say more about the next token than the token itself.
    """
    torch.manual_seed(seed)
    config = replace(SMALL, **changes)  # type: ignore[arg-type]
    model = MemorizingTransformerForCausalLM(MemorizingTransformerConfig.from_model_config(config))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
        for block in model.model.blocks:
            block.attention.output.weight *= loudness
            block.feed_forward.contract.weight *= loudness
    return model.eval()


def get_history(output: Any) -> Any:
    """The history in what a call or `generate` returned."""
    return getattr(output, CACHE_NAME)


def decode_greedily(model: MemorizingTransformer, prompt: Tensor, num_new: int) -> list[int]:
    """The model's own loop over one row: a token a call, committed at once."""
    state = model.init_state(1)
    found: list[int] = []
    with torch.no_grad():
        for index in range(len(prompt) + num_new - 1):
            token = int(prompt[index]) if index < len(prompt) else found[-1]
            output = model(torch.tensor([[token]]), state)
            state = output.state.commit()
            if index >= len(prompt) - 1:
                found.append(int(output.logits[0, -1].argmax()))
    return found


def pad_left(prompts: list[Tensor], pad: int = 0) -> tuple[Tensor, Tensor]:
    """Tokens and attention mask of a batch."""
    width = max(len(prompt) for prompt in prompts)
    tokens = torch.full((len(prompts), width), pad)
    mask = torch.zeros(len(prompts), width, dtype=torch.int64)
    for row, prompt in enumerate(prompts):
        tokens[row, width - len(prompt) :] = prompt
        mask[row, width - len(prompt) :] = 1
    return tokens, mask
