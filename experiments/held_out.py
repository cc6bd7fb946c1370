"""Held-out documents of a run, for scripts that read them segment by segment themselves."""

from __future__ import annotations

import torch
from torch import Tensor

from memorizing.config import Config
from memorizing.data import (
    TokenizedDocument,
    Tokenizer,
    load_splits,
    take_beginnings,
    tokenize_documents,
)


def load_documents(
    config: Config, tokenizer: Tokenizer, max_tokens: int, use: str = "validation"
) -> list[TokenizedDocument]:
    """The first tokens of every document held out for choices (`validation`) or claims (`test`)."""
    documents = tokenize_documents(getattr(load_splits(config.data), use), tokenizer)
    return take_beginnings(documents, tokenizer, max_tokens)


def make_inputs(document: TokenizedDocument, start_token: int) -> tuple[Tensor, Tensor]:
    """What is read and what is predicted, (1, n) each; the start token precedes the document."""
    targets = torch.from_numpy(document.tokens).long().unsqueeze(0)
    return torch.cat([torch.tensor([[start_token]]), targets[:, :-1]], 1), targets
