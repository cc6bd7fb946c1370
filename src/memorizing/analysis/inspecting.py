"""Reading a text with and without memory, for a page: models of ours, and of `transformers`."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from memorizing.analysis.inspection import Inspection, Seen, Source
from memorizing.analysis.traces import KEPT, Trace, record_retrieval, trace_document
from memorizing.errors import ConfigError, TokenizerError
from memorizing.evaluation import Progress
from memorizing.index_settings import parse_index
from memorizing.model import MemorizingTransformer

if TYPE_CHECKING:
    from memorizing.data import Document, TokenizedDocument, Tokenizer
    from memorizing.huggingface.sessions.session import MemorySession

_TOKENS_COMPARED = 2048
"""Whose neighbors are compared at a time."""


def inspect_run(
    model: MemorizingTransformer,
    tokenizer: Tokenizer,
    document: Document,
    *,
    name: str,
    capacity: int | None = None,
    against: int = 0,
    max_tokens: int = 0,
    progress: Progress | None = None,
) -> Inspection:
    """Read a text with a model of ours: with one memory, and with a smaller one or none.

    Args:
        model: with memory layers.
        tokenizer: of the model.
        document: the text.
        name: of the model, on the page.
        capacity: entries of the memory; None takes the configuration's.
        against: entries of the memory that it is compared with; 0 is none.
        max_tokens: only the first tokens; 0 reads all.
        progress: called after every segment.

    Raises:
        ConfigError: a model without memory, no text, or a capacity that the model cannot have.
    """
    config = model.config
    capacity = config.capacity if capacity is None else capacity
    _check_sizes(capacity, against)
    source, tokenized = _tokenize(tokenizer, document, max_tokens)
    is_exact = _is_exact(config.index)
    passes = 2 if is_exact else 3

    def trace(number: int, size: int, kept: int = KEPT) -> Trace:
        return trace_document(
            model,
            tokenized,
            tokenizer.start_token,
            size,
            kept=kept,
            progress=_share(progress, number, passes),
        )

    recall = None
    found = trace(0, capacity, KEPT if is_exact else config.num_neighbors)
    if not is_exact:
        model.config = dataclasses.replace(config, index="exact")
        try:
            recall = compute_recall(found, trace(2, capacity, config.num_neighbors))
        finally:
            model.config = config
    return Inspection(
        model=name,
        memory=_name_capacity(capacity),
        baseline=_name_capacity(against),
        sources=(source,),
        trace=found,
        baseline_nats=trace(1, against, 1).nats,
        segment_len=config.segment_len,
        capacity=capacity,
        num_bytes=tokenized.num_bytes or None,
        index=config.index,
        recall=recall,
    )


def inspect_model(
    model: Any,
    tokenizer: Any,
    document: Document,
    session: MemorySession | None = None,
    *,
    name: str,
    memory_name: str = "memory",
    capacity: int | None = None,
    against: int = 0,
    max_tokens: int = 0,
    progress: Progress | None = None,
) -> Inspection:
    """Read a text with a model of `transformers`: with its memory, and with less of it or none.

    Args:
        model: with `add_memory`.
        tokenizer: of the model.
        document: the text.
        session: an open memory of the model, which is entered; None reads the text's own only.
        name: of the model, on the page.
        memory_name: what is read, on the page.
        capacity: entries of the text's own memory; None is that of `add_memory`.
        against: entries of the memory that it is compared with, besides what is open; 0 reads
            nothing at all.
        max_tokens: only the first tokens; 0 reads all.
        progress: called after every segment.

    Raises:
        ConfigError: no text, or a capacity that cannot be.
        TokenizerError: a tokenizer that does not tell where its tokens are in the text.
    """
    from memorizing.evaluation import evaluate_model
    from memorizing.huggingface.attaching.attachment import get_attachment
    from memorizing.huggingface.sessions.scoring import search_exactly
    from memorizing.huggingface.sessions.texts import wrap_tokenizer

    attachment = get_attachment(model)
    settings = attachment.settings
    capacity = settings.capacity if capacity is None else capacity
    _check_sizes(capacity, against)
    wrapped = wrap_tokenizer(tokenizer)
    if wrapped is None:
        raise TokenizerError(
            "this tokenizer does not tell where its tokens are in a text; use one of the "
            "`tokenizers` package, as almost all models have"
        )
    source, tokenized = _tokenize(wrapped, document, max_tokens)
    # Passages are not found entry by entry.
    is_compared = settings.read != "passages" and not _is_exact(settings.index)
    passes = 3 if is_compared else 2

    def read(number: int) -> Trace:
        kept = settings.num_neighbors if is_compared else KEPT
        with record_retrieval(attachment, source.num_tokens, kept) as (recorder, count):
            shown = _share(progress, number, passes)

            def on_progress(done: int, total: int) -> None:
                count(done, total)
                if shown is not None:
                    shown(done, total)

            result = evaluate_model(
                model, [tokenized], tokenizer, capacity=capacity, progress=on_progress
            )
        return recorder.finish(result.documents[0].token_nats)

    trace, recall = read(0), None
    baseline = evaluate_model(
        model, [tokenized], tokenizer, capacity=against, progress=_share(progress, 1, passes)
    )
    if is_compared:
        with search_exactly(attachment):
            recall = compute_recall(trace, read(2))
    sources, trace, sights = _find_sources(source, trace, session, tokenizer)
    return Inspection(
        model=name,
        memory=f"with {memory_name}",
        baseline=_name_capacity(against),
        sources=sources,
        trace=trace,
        baseline_nats=baseline.documents[0].token_nats,
        segment_len=settings.segment_len,
        capacity=capacity,
        num_bytes=tokenized.num_bytes or None,
        sights=sights,
        index=settings.index,
        recall=recall,
    )


def _is_exact(index: str) -> bool:
    return parse_index(index) == parse_index("exact")


def _check_sizes(capacity: int, against: int) -> None:
    if against >= capacity:
        raise ConfigError(
            f"the memory has {capacity:,} entries and is compared with one of {against:,}; give a "
            "smaller one, or 0 for none"
        )


def _name_capacity(capacity: int) -> str:
    return f"with {capacity:,} entries" if capacity else "without memory"


def _share(progress: Progress | None, number: int, passes: int) -> Progress | None:
    """Progress of one of several passes as that of all."""
    if progress is None:
        return None
    return lambda done, total: progress(number * total + done, passes * total)


def _tokenize(
    tokenizer: Tokenizer, document: Document, max_tokens: int
) -> tuple[Source, TokenizedDocument]:
    from memorizing.data import TokenizedDocument

    tokens, ends = tokenizer.encode_with_ends(document.text)
    if not len(tokens):
        raise ConfigError(f"{document.name!r} has no tokens; give a text")
    is_whole = not max_tokens or len(tokens) <= max_tokens
    if not is_whole:
        tokens, ends = tokens[:max_tokens], ends[:max_tokens]
    text = document.text if is_whole else document.text[: ends[-1]]
    ends[-1] = len(text)  # what no token stands for, after the last
    source = Source(document.name, len(tokens), 0, text, tokens, ends)
    num_bytes = document.num_bytes if is_whole else 0
    return source, TokenizedDocument(document.name, tokens, num_bytes)


def compute_recall(found: Trace, exact: Trace) -> float:
    """The share of what exact search finds that was found too, in the first memory layer.

    In the layers above it, other queries are asked once other entries were retrieved.
    """
    heads = [number for number, (layer, _) in enumerate(exact.heads) if layer == exact.heads[0][0]]
    both = wanted = 0
    for first in range(0, exact.num_tokens, _TOKENS_COMPARED):
        part = slice(first, first + _TOKENS_COMPARED)
        mine, theirs = found.places[part, heads], exact.places[part, heads]
        is_there = theirs >= 0
        is_found = (theirs[..., :, None] == mine[..., None, :]).any(-1)
        both, wanted = both + int((is_found & is_there).sum()), wanted + int(is_there.sum())
    return both / wanted if wanted else 1.0


def _find_sources(
    text: Source, trace: Trace, session: MemorySession | None, tokenizer: Any
) -> tuple[tuple[Source, ...], Trace, tuple[Seen, ...]]:
    """The text and the documents that were read from it was retrieved; places among all of them."""
    documents = () if session is None else session.documents
    firsts = np.cumsum([0, *(document.num_entries for document in documents)])
    entries = trace.places - (trace.num_tokens + 1)
    numbers = np.searchsorted(firsts, entries, side="right") - 1
    names = [document.name for document in documents]
    used = set(np.unique(numbers[entries >= 0]).tolist()) | {
        names.index(one.document)
        for sight in trace.sights
        for one in sight.passages
        if one.document is not None
    }
    sources, first, places = [text], trace.num_tokens + 1, trace.places.copy()
    by_name = {}
    for number in sorted(used):
        assert session is not None
        document = documents[number]
        source = _read_source(session, document.name, document.num_tokens, first, tokenizer)
        held = np.asarray(session.list_tokens(document.name))
        chosen = (entries >= 0) & (numbers == number)
        places[chosen] = first + 1 + held[entries[chosen] - firsts[number]]
        first += document.num_tokens + 1
        sources.append(source)
        by_name[document.name] = source
    seen = []
    for sight in trace.sights:
        passages = []
        for one in sight.passages:
            # Of the text itself, what was read begins with a start token.
            begin = max(0, one.start - 1)
            if one.document is not None:
                begin = by_name[one.document].first + one.start
            passages.append((begin, one.end - one.start, one.score))
        seen.append(Seen(sight.first, tuple(passages)))
    return tuple(sources), dataclasses.replace(trace, places=places, sights=()), tuple(seen)


def _read_source(
    session: MemorySession, name: str, num_tokens: int, first: int, tokenizer: Any
) -> Source:
    from memorizing.huggingface.sessions.texts import encode_with_offsets

    text = session.read_text(name)
    if text is None:
        return Source(name, num_tokens, first)
    tokens, offsets = encode_with_offsets(tokenizer, text)
    if offsets is None or len(tokens) != num_tokens:
        return Source(name, num_tokens, first)
    ends: NDArray[np.int64] = np.maximum.accumulate(offsets[:, 1])
    return Source(name, num_tokens, first, text, tokens, ends)
