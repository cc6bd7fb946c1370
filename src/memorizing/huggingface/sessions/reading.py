"""Documents through a model into memory: tokens, entries, nothing else."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from memorizing.errors import CorpusError
from memorizing.huggingface.attaching.attachment import Attachment
from memorizing.huggingface.attaching.memory_layer import EntriesRead
from memorizing.memory.disk import LayerEntries, NewDocument, hash_text


@dataclass(frozen=True)
class Text:
    """A document to be read."""

    name: str
    text: str


def list_texts(documents: Any) -> Iterator[Text]:
    """Documents as they may be given: of `memorizing`, pairs of name and text, or a dict.

    Raises:
        CorpusError: what is neither.
    """
    if isinstance(documents, str):
        raise CorpusError(
            "documents are one text without a name; give (name, text) pairs, a dict of them, or "
            "memorizing.load_corpus(...)"
        )
    items: Iterable[Any] = documents.items() if isinstance(documents, dict) else documents
    for item in items:
        if isinstance(item, (tuple, list)) and len(item) == 2:
            name, text = item
        else:
            name, text = getattr(item, "name", None), getattr(item, "text", None)
        if not isinstance(name, str) or not isinstance(text, str) or not name:
            raise CorpusError(
                f"a document is a {type(item).__name__}; give (name, text) pairs of strings, or "
                "documents with a name and a text"
            )
        yield Text(name, text)


@dataclass(frozen=True)
class TokenizedText:
    """A document as the model reads it."""

    text: Text
    tokens: Tensor
    """(n,) int64."""
    offsets: Tensor | None
    """(n, 2): first character of each token and the one after its last, where known."""


@dataclass(frozen=True)
class ReadDocument:
    """A document that was read whole."""

    description: NewDocument
    pieces: list[LayerEntries]


def tokenize(tokenizer: Any, text: Text, *, with_offsets: bool) -> TokenizedText:
    """A document with the special tokens that the tokenizer puts around a text."""
    with_offsets = with_offsets and bool(getattr(tokenizer, "is_fast", False))
    encoded = tokenizer(
        text.text, return_offsets_mapping=with_offsets, verbose=False, truncation=False
    )
    tokens = torch.tensor(encoded["input_ids"], dtype=torch.int64)
    offsets = None
    if with_offsets:
        offsets = torch.tensor(encoded["offset_mapping"], dtype=torch.int64).view(-1, 2)
    return TokenizedText(text, tokens, offsets)


def read_tokens(attachment: Attachment, tokens: Tensor) -> Iterator[LayerEntries]:
    """The entries of a document, a segment at a time; (H, n, D) per layer.

    A document is read alone: its entries do not depend on what else is in memory. Nothing above the
    last memory layer is computed.

    Args:
        attachment: of the model. Not changed.
        tokens: (n,) int64.
    """
    model = attachment.model()
    device = model.get_input_embeddings().weight.device
    settings, dtype = attachment.settings, attachment.stored_dtype
    cache, num_left_out = attachment.make_cache(), settings.num_sinks
    was_training = model.training
    model.eval()
    try:
        for piece in tokens.split(settings.segment_len) if len(tokens) else ():
            with torch.no_grad(), attachment.collect() as collected, suppress(EntriesRead):
                attachment.decoder.base(
                    input_ids=piece.unsqueeze(0).to(device), **attachment.pass_cache(cache)
                )
            yield {
                layer: (
                    keys[0, :, num_left_out:].to("cpu", dtype),
                    values[0, :, num_left_out:].to("cpu", dtype),
                )
                for layer, (keys, values) in collected.items()
            }
            num_left_out = max(0, num_left_out - len(piece))
    finally:
        model.train(was_training)


def join_entries(
    pieces: Sequence[LayerEntries], attachment: Attachment
) -> dict[int, tuple[Tensor, Tensor]]:
    """Entries (H, n, D) of all memory layers one after another; of no pieces, none."""
    num_heads, head_dim = attachment.entry_shape
    nothing = torch.zeros(num_heads, 0, head_dim, dtype=attachment.stored_dtype)
    return {
        layer: (
            torch.cat([nothing, *(piece[layer][0] for piece in pieces)], 1),
            torch.cat([nothing, *(piece[layer][1] for piece in pieces)], 1),
        )
        for layer in attachment.settings.layers
    }


def describe_document(read: TokenizedText, num_sinks: int, *, keep_text: bool) -> NewDocument:
    """A document as a memory knows it."""
    num_tokens = len(read.tokens)
    first = min(num_sinks, num_tokens)
    return NewDocument(
        read.text.name,
        num_tokens,
        num_tokens - first,
        hash_text(read.text.text),
        text=read.text.text if keep_text else None,
        token_offsets=read.offsets if keep_text else None,
        entry_tokens=torch.arange(first, num_tokens),
    )
