"""Passages: contiguous stretches of what was read, found by a few heads, for all layers to read.

A chunk is given a share of attention by every one of a text's last queries, if all entries that
were ever read stood at one distance; and its score is what these queries say together:

    share(t, c) = mean over layers, heads h of  sum_{e in c} softmax_e(s_h q_ht . k_he)
    score(c) = mean over queries t of  log(share(t, c) + 0.001)

(Wu et al. 2024, "retrieval heads"; QRRetriever, 2025, sums the shares: there one query that is sure
of a wrong place outweighs fifteen that point to the right one.) The softmax is over all entries of
all documents, but for sinks. Passages lie around the best chunks.

Shapes: B rows, K heads of keys, G heads of queries per head of keys, T queries, n entries, D
head_dim.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

import torch
from torch import Tensor

from memorizing.memory.frozen import FrozenMemory

CHUNK_LEN = 32
"""Entries that are scored together."""
LAST = 16
"""Queries that find: those of the last tokens."""
_TILE = 65_536
"""Entries whose scores are computed together."""
_LEAST_SHARE = 1e-3
"""What a query says of a chunk that it gives nothing."""
_SINK = 0.35
"""Values shorter than this share of the median are sinks: first tokens of a text, and those that
end one. Every query gives them weight, and they say nothing (Xiao et al. 2023)."""


@dataclass(frozen=True)
class Collection:
    """Entries of documents, one behind the other, that passages are found among."""

    num_entries: tuple[int, ...]
    """Per document."""
    layers: Mapping[int, Sequence[tuple[Tensor, Tensor]]]
    """Per layer that finds, in the order of the entries, keys and values (K, n, D)."""

    @cached_property
    def first_entries(self) -> list[int]:
        """Per document, the number of its first entry; then the number of all."""
        return [0, *accumulate(self.num_entries)]

    @cached_property
    def chunks(self) -> Tensor:
        """(n,) int64: the chunk of every entry; none goes over the end of a document."""
        parts, first = [torch.zeros(0, dtype=torch.int64)], 0
        for count in self.num_entries:
            parts.append(torch.arange(count) // CHUNK_LEN + first)
            first += -(-count // CHUNK_LEN)
        return torch.cat(parts)

    @cached_property
    def first_of_chunk(self) -> Tensor:
        """(chunks,) int64: the first entry of every chunk."""
        return torch.cat([torch.tensor([-1]), self.chunks]).diff().nonzero().flatten()

    @cached_property
    def is_sink(self) -> Tensor:
        """(n,) bool on the CPU: entries that are never found, nor part of a passage."""
        for parts in self.layers.values():
            norms = [values.float().norm(dim=-1).mean(0).cpu() for _, values in parts]
            length = torch.cat(norms) if norms else torch.zeros(0)
            return length < _SINK * length.median() if len(length) else length.bool()
        return torch.zeros(0, dtype=torch.bool)

    def find_document(self, entry: int) -> int:
        """The number of the document of an entry."""
        return bisect.bisect_right(self.first_entries, entry) - 1


def collect_base(base: Mapping[int, FrozenMemory], num_entries: Sequence[int]) -> Collection:
    """The documents of an open memory."""
    layers = {}
    for layer, memory in base.items():
        blocks = [block.load() for block in memory.blocks]
        layers[layer] = [(block.keys[0], block.values[0]) for block in blocks]
    return Collection(tuple(num_entries), layers)


def weigh_chunks(
    queries: Mapping[int, Tensor], places: Mapping[int, Tensor], collections: Sequence[Collection]
) -> list[Tensor]:
    """Shares of attention (T, chunks) fp32 of each collection; a query's all together sum to 1.

    Args:
        queries: per layer, (P, T, D) of one row, those of a head of keys side by side, free of
            positions, multiplied by the scale of the layer.
        places: per layer, which of the P find; the others fill a group up.
        collections: what is attended to, with K heads; one softmax goes over all of them.
    """
    num_queries = next((asked.shape[1] for asked in queries.values()), 0)
    sums = [torch.zeros(num_queries, len(part.first_of_chunk)) for part in collections]
    for layer, asked in queries.items():
        asked = asked.float()
        total = torch.full(asked.shape[:2], -torch.inf, device=asked.device)
        for _, _, scores in _iterate_scores(layer, asked, collections):
            total = torch.logaddexp(total, scores.logsumexp(-1))
        total = total.masked_fill(total == -torch.inf, 0.0).unsqueeze(-1)
        for number, span, scores in _iterate_scores(layer, asked, collections):
            shares = (scores - total).exp().index_select(0, places[layer]).mean(0)
            sums[number].index_add_(1, collections[number].chunks[span], shares.cpu())
    return [part / max(1, len(queries)) for part in sums]


def _iterate_scores(
    layer: int, asked: Tensor, collections: Sequence[Collection]
) -> Iterator[tuple[int, slice, Tensor]]:
    """Number of a collection, entries, and their scores (P, T, entries); -inf of sinks."""
    for number, part in enumerate(collections):
        first = 0
        for keys, _ in part.layers.get(layer, ()):
            by_head = asked.unflatten(0, (keys.shape[0], -1)).flatten(1, 2)
            for tile in keys.split(_TILE, 1):
                span = slice(first, first + tile.shape[1])
                first = span.stop
                scores = torch.matmul(by_head, tile.float().transpose(1, 2).to(asked.device))
                scores = scores.view(*asked.shape[:2], -1)
                hidden = part.is_sink[span].to(scores.device)
                yield number, span, scores.masked_fill(hidden, -torch.inf)


def score_chunks(shares: Tensor) -> Tensor:
    """Scores (..., chunks) of shares of attention (..., T, chunks)."""
    return (shares + _LEAST_SHARE).log().mean(-2)


@dataclass(frozen=True)
class Span:
    """Entries of one collection that make a passage."""

    collection: int
    document: int
    start: int
    """Number of its first entry in the collection."""
    end: int
    chunk: int
    """Number of the first entry of the chunk around which it lies."""
    score: float
    """Share of attention of this chunk, on average."""


def choose_spans(
    collections: Sequence[Collection],
    shares: Sequence[Tensor],
    num_passages: int,
    passage_len: int,
) -> list[Span]:
    """Spans around the best chunks, best first, inside their documents; no two overlap.

    Args:
        collections: what they are chosen from.
        shares: per collection, those of its chunks (T, chunks).
        num_passages: at most.
        passage_len: entries of each, at most: half of them before the middle of the chunk.
    """
    candidates: list[tuple[float, int, int, float]] = []
    for number, (part, share) in enumerate(zip(collections, shares, strict=True)):
        if not share.numel():
            continue
        scores = score_chunks(share)
        # A passage overlaps at most so many chunks besides its own.
        most = num_passages * (2 * (passage_len // CHUNK_LEN) + 3)
        best = scores.topk(min(most, len(scores)))
        first, mean = part.first_of_chunk[best.indices], share.mean(0)[best.indices]
        numbers = [number] * len(first)
        candidates += zip(best.values.tolist(), numbers, first.tolist(), mean.tolist(), strict=True)
    chosen: list[Span] = []
    for _, number, chunk, score in sorted(candidates, reverse=True):
        part = collections[number]
        document = part.find_document(chunk)
        first, last = part.first_entries[document], part.first_entries[document + 1]
        start = max(first, min(chunk + CHUNK_LEN // 2 - passage_len // 2, last - passage_len))
        end = min(last, start + passage_len)
        span = Span(number, document, start, end, chunk, score)
        is_new = all(
            number != other.collection or end <= other.start or other.end <= start
            for other in chosen
        )
        if score > 0 and is_new:
            chosen.append(span)
        if len(chosen) == num_passages:
            break
    return chosen
