"""Documents as token ids of a tokenizer of `transformers`."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from memorizing.data import Document, TokenizedDocument, cut_documents, tokenize_documents
from memorizing.errors import ConfigError, CorpusError
from memorizing.huggingface.sessions.texts import encode_text, wrap_tokenizer


def tokenize_for_model(
    documents: Iterable[Document] | Iterable[TokenizedDocument],
    tokenizer: Any,
    *,
    max_tokens: int = 0,
    min_tokens: int = 0,
) -> list[TokenizedDocument]:
    """Tokenize documents that are not yet, then cut them (`cut_documents`).

    Texts are kept tokenized on disk (`MEMORIZING_CACHE`).

    Args:
        documents: all texts, or all tokenized.
        tokenizer: of the model; None where nothing is to be tokenized or cut.
        max_tokens: longer documents are cut; 0 leaves them whole.
        min_tokens: shorter documents are left out.

    Raises:
        ConfigError: texts, or documents to cut, and no tokenizer that can.
        CorpusError: all documents are too short.
    """
    items: list[Any] = list(documents)
    own = None if tokenizer is None else wrap_tokenizer(tokenizer)
    tokenized = [item for item in items if isinstance(item, TokenizedDocument)]
    if len(tokenized) < len(items):
        if tokenizer is None:
            raise ConfigError("documents are texts; give the tokenizer of the model")
        if own is not None:
            return tokenize_documents(items, own, max_tokens=max_tokens, min_tokens=min_tokens)
        tokenized = [
            TokenizedDocument(item.name, encode_text(tokenizer, item.text), item.num_bytes)
            for item in items
        ]
    if own is not None:
        return cut_documents(tokenized, own, max_tokens, min_tokens)
    if max_tokens:
        raise ConfigError(
            f"max_document_tokens is {max_tokens}, and the tokenizer cannot tell the bytes of a "
            "token; use 0, or a fast tokenizer"
        )
    kept = [one for one in tokenized if len(one.tokens) >= max(min_tokens, 1)]
    if tokenized and not kept:
        raise CorpusError(f"every document is shorter than {min_tokens} tokens")
    return kept
