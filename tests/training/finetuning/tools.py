"""A tiny model of `transformers`, documents and a tokenizer. Sizes are different primes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import tokenizers
import torch
from tokenizers import decoders, models, pre_tokenizers
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from memorizing.data import Document, TokenizedDocument
from memorizing.huggingface.attaching.attachment import add_memory
from tests.huggingface.tools import CACHE

VOCAB_SIZE = 263
START = 257
SEGMENT_LEN = 7
WINDOW = 11
LAYER = 1
MEMORY = {
    "layers": [LAYER],
    "read": "entries",
    "window": WINDOW,
    "segment_len": SEGMENT_LEN,
    "num_sinks": 2,
    "capacity": 23,
    "num_neighbors": 5,
    "dtype": "float32",
}
PASSAGES: dict[str, Any] = {"read": "passages", "num_passages": 2, "passage_len": 5}


def make_base(seed: int = 0, **changes: Any) -> LlamaForCausalLM:
    """A random Llama with grouped queries, whose layers say something about the next token."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        **{
            "vocab_size": VOCAB_SIZE,
            "hidden_size": 3 * 10,
            "intermediate_size": 37,
            "num_hidden_layers": 3,
            "num_attention_heads": 3,
            "num_key_value_heads": 1,
            "head_dim": 10,
            "max_position_embeddings": 101,
            "tie_word_embeddings": True,
            "bos_token_id": START,
            "eos_token_id": START,
            "initializer_range": 0.2,
            **changes,
        }
    )
    return LlamaForCausalLM(config).eval()


def make_gpt2(seed: int = 0) -> GPT2LMHeadModel:
    """A random GPT-2, whose projections are `Conv1D`."""
    torch.manual_seed(seed)
    config = GPT2Config(
        vocab_size=VOCAB_SIZE,
        n_embd=3 * 10,
        n_head=3,
        n_layer=3,
        n_positions=101,
        bos_token_id=START,
        eos_token_id=START,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
    )
    return GPT2LMHeadModel(config).eval()


def make_model(seed: int = 0, **memory: Any) -> Any:
    """The same with a memory."""
    return add_memory(make_base(seed), **{**MEMORY, **memory})


def make_documents(*lengths: int, seed: int = 0) -> list[TokenizedDocument]:
    """Documents of tokens, which repeat themselves."""
    rng = np.random.default_rng(seed)
    documents = []
    for number, length in enumerate(lengths):
        phrase = rng.integers(0, 256, 13)
        tokens = np.where(rng.random(length) < 0.2, rng.integers(0, 256, length), 0)
        tokens = np.where(tokens > 0, tokens, np.resize(phrase, length)).astype(np.int32)
        documents.append(TokenizedDocument(f"d{number}", tokens, length))
    return documents


def make_texts(*lengths: int) -> list[Document]:
    """Documents of text; a byte is a token."""
    return [
        Document(f"t{number}", (f"a memory read {number} times. " * length)[:length])
        for number, length in enumerate(lengths)
    ]


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A token per byte."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: number for number, letter in enumerate(alphabet)}
    backend = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<pad>", "<s>"])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="<s>", pad_token="<pad>"
    )


def list_weights(model: Any, *parts: str) -> dict[str, torch.Tensor]:
    """Copies of the parameters whose names hold one of `parts`; of all without any."""
    return {
        name: parameter.detach().clone()
        for name, parameter in model.named_parameters()
        if not parts or any(part in name for part in parts)
    }


def read_alone(
    model: Any, tokens: Sequence[int] | np.ndarray, memory: Any, segment_len: int = SEGMENT_LEN
) -> torch.Tensor:
    """Logits of one document by the public session, a segment a call."""
    inputs = torch.tensor([[START, *np.asarray(tokens)[:-1].tolist()]])
    cache = memory.new_cache()
    with torch.no_grad():
        parts = [
            model(input_ids=piece, **{CACHE: cache}, use_cache=True).logits
            for piece in inputs.split(segment_len, 1)
        ]
    return torch.cat(parts, 1)
