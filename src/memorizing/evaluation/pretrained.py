"""Perplexity of a model of `transformers` with memory, over whole documents."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from memorizing.config import Control
from memorizing.errors import ConfigError
from memorizing.evaluation.in_context import InContext, score_in_context
from memorizing.evaluation.reading import Progress
from memorizing.evaluation.results import DocumentResult, EvaluationResult
from memorizing.huggingface.attaching.attachment import get_attachment, unwrap
from memorizing.huggingface.sessions.scoring import Tokens, find_start_token, score_texts
from memorizing.huggingface.sessions.texts import encode_text
from memorizing.ranks import ALONE, Ranks

if TYPE_CHECKING:
    from memorizing.data import Document, TokenizedDocument


def evaluate_model(
    model: Any,
    documents: Sequence[TokenizedDocument] | Sequence[Document],
    tokenizer: Any = None,
    *,
    capacity: int | None = None,
    control: Control | None = None,
    max_tokens: int = 0,
    seed: int = 0,
    start_token: int | None = None,
    progress: Progress | None = None,
    ranks: Ranks = ALONE,
) -> EvaluationResult:
    """Read documents from their first token to their last and keep the nats of every token.

    Documents are read one by one, in segments, through a window cache, as in `score_texts`; the
    result does not depend on how many there are, except under `other_document`.

    Args:
        model: of `transformers`, with `add_memory`.
        documents: with their texts, or as token ids without special tokens.
        tokenizer: of the model; needed for texts.
        capacity: entries of the memory; None is that of `add_memory`, 0 turns it off.
        control: as in `score_texts`.
        max_tokens: only the first tokens of each document are read; 0 reads them whole.
        seed: of `shuffled`.
        start_token: precedes every document; None takes `find_start_token`.
        progress: called after every segment.
        ranks: processes that read these documents together; each has the whole result.

    Raises:
        ConfigError: nothing to read, texts without a tokenizer, or what `score_texts` refuses.
    """
    tokens = _tokenize_all(documents, tokenizer)
    found = score_texts(
        model,
        tokens,
        find_start_token(model, tokenizer) if start_token is None else start_token,
        control=control,
        capacity=capacity,
        max_tokens=max_tokens,
        seed=seed,
        progress=progress,
        ranks=ranks,
    )
    held = get_attachment(unwrap(model)).settings.capacity if capacity is None else capacity
    results = _name_nats(documents, tokens, found)
    return EvaluationResult(results, 0 if control == "off" else held, control)


def evaluate_in_context(
    model: Any,
    documents: Sequence[TokenizedDocument] | Sequence[Document],
    tokenizer: Any,
    how: InContext | None = None,
    *,
    max_tokens: int = 0,
    start_token: int | None = None,
    progress: Progress | None = None,
) -> EvaluationResult:
    """The same without a memory, with what BM25 finds of a document pasted before the window.

    Args:
        model: of `transformers`, with `add_memory`, whose window and passages are compared with.
        documents: as in `evaluate_model`.
        tokenizer: of the model.
        how: passages are found; None is as the paper did.
        max_tokens: as in `evaluate_model`.
        start_token: as in `evaluate_model`.
        progress: called after every stride.

    Raises:
        ConfigError: nothing to read, or what `score_in_context` refuses.
        IndexUnavailableError: bm25s is not installed.
    """
    tokens = _tokenize_all(documents, tokenizer)
    found = score_in_context(
        model,
        tokens,
        tokenizer,
        find_start_token(model, tokenizer) if start_token is None else start_token,
        how or InContext(),
        max_tokens=max_tokens,
        progress=progress,
    )
    return EvaluationResult(_name_nats(documents, tokens, found), 0)


def _name_nats(
    documents: Sequence[Any], tokens: Sequence[Tokens], found: Sequence[NDArray[np.float32]]
) -> tuple[DocumentResult, ...]:
    return tuple(
        DocumentResult(document.name, nats, document.num_bytes if len(nats) == len(part) else None)
        for document, nats, part in zip(documents, found, tokens, strict=True)
    )


def _tokenize_all(documents: Sequence[Any], tokenizer: Any) -> list[np.ndarray]:
    tokens = [_tokenize(document, tokenizer) for document in documents]
    if not any(len(part) for part in tokens):
        raise ConfigError("there are no tokens to evaluate; give documents with text")
    return tokens


def _tokenize(document: Any, tokenizer: Any) -> np.ndarray:
    tokens = getattr(document, "tokens", None)
    if tokens is not None:
        return np.asarray(tokens)
    if tokenizer is None:
        raise ConfigError(
            f"document {document.name!r} is a text; give the tokenizer of the model too"
        )
    return encode_text(tokenizer, document.text)
