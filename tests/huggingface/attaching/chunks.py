"""What is found in several collections at once, put together of what each of them tells."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from memorizing.huggingface.attaching.passages import (
    Collection,
    Span,
    add_sums,
    choose_among,
    choose_in,
    count_words,
    list_words,
    match_words,
    rank_part,
    share_out,
    sum_chunks,
    total_sums,
    weigh_words,
)


def weigh_chunks(
    queries: Mapping[int, Tensor],
    places: Mapping[int, Tensor],
    collections: Sequence[Collection],
    num_neighbors: int,
) -> list[Tensor]:
    """Shares of attention (T, c) of each collection."""
    sums = [sum_chunks(queries, places, part, num_neighbors) for part in collections]
    totals = add_sums([total_sums(one) for one in sums])
    num_queries = next(asked.shape[1] for asked in queries.values())
    return [
        share_out(one, totals, len(part.first_of_chunk), num_queries)
        for one, part in zip(sums, collections, strict=True)
    ]


def match(words: Tensor, collections: Sequence[Collection]) -> list[Tensor]:
    """BM25 (4, c) of the chunks of each collection."""
    wanted = list_words(words)
    counts = [count_words(wanted, part) for part in collections]
    holding = torch.stack([(count > 0).sum(1) for count in counts]).sum(0)
    weights = weigh_words(wanted, holding, sum(count.shape[1] for count in counts))
    return [match_words(*one, weights) for one in zip(collections, counts, strict=True)]


def rank_chunks(shares: Sequence[Tensor], matches: Sequence[Tensor]) -> list[Tensor]:
    """Scores (c,) of the chunks of each collection, by shares of what they are scored by."""
    total = torch.cat(list(matches), 1).logsumexp(1)
    return [rank_part(share, match, total) for share, match in zip(shares, matches, strict=True)]


def choose_spans(
    collections: Sequence[Collection],
    shares: Sequence[Tensor],
    scores: Sequence[Tensor],
    num_passages: int,
    passage_len: int,
    margin: float,
    *,
    is_written: bool = False,
) -> list[Span]:
    """The best spans of all collections."""
    found = [
        replace(span, collection=number)
        for number, part in enumerate(collections)
        for span in choose_in(
            part, shares[number], scores[number], num_passages, passage_len, is_written=is_written
        )
    ]
    return choose_among(found, num_passages, margin)
