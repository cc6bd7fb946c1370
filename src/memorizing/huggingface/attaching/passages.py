"""Passages: contiguous stretches of what was read, found by a few heads, for all layers to read.

A chunk is given a share of attention by every one of a text's last queries, if all entries that
were ever read stood at one distance; and its score is what these queries say together, and the
words of the text's last tokens, of the chunk c with the one that follows it in its document, cc:

    share(t, c) = mean over layers, heads h of  sum_{e in c} softmax_e(s_h q_ht . k_he)
    score(c) = mean over queries t of  log(share(t, cc) + 0.001)
               + log(mean over x in (c, cc), a in (1, r) of  softmax_c(bm25(x, a)) + 0.001)
    bm25(x, a) = sum over different words w of  a_w log(1 + (C - df_w + 0.5) / (df_w + 0.5))
                                                * 2.2 tf_wx / (tf_wx + 1.2)
    r_w = 1 / (1 + d_w / 4), where w stands last d_w tokens before the end

(Wu et al. 2024, "retrieval heads"; QRRetriever, 2025, sums the shares: there one query that is sure
of a wrong place outweighs fifteen that point to the right one. Robertson & Zaragoza 2009, BM25,
which estimates logarithms of odds; chunks are equally long, and df_w of all C hold w.) A word is a
token, or two that stand side by side: names are many tokens, each of which is common. Where heads
are unsure, words decide, and the other way round. All words tell what a text is about, the nearest
ones what it names: what a quote goes on with is found by the former, and what is called, or asked
for, by the latter. What is asked for may lie on both sides of the end of a chunk: two are sure to
have it whole where it is not longer than one; and one has less beside it that says nothing. The
softmax of shares is over all entries of all documents, but for sinks; of blocks that an index
searches, over the k nearest to each query. Passages lie around the best chunks.

Keys are read once, a tile at a time, as in the online softmax (Milakov & Gimelshein 2018): the logs
of the sums over chunks are kept, and divided by the total when that is known.

Shapes: B rows, K heads of keys, G heads of queries per head of keys, T queries, n entries, c
chunks, F heads of queries that find, D head_dim, k neighbors.
"""

from __future__ import annotations

import bisect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from memorizing.index_settings import ExactSettings
from memorizing.memory import Memory
from memorizing.memory.frozen import FrozenMemory

CHUNK_LEN = 32
"""Entries that are scored together."""
LAST = 16
"""Queries that find: those of the last tokens."""
LAST_WORDS = 64
"""Tokens whose words find: the last ones."""
_TILE = 256
"""Chunks that are scored at a time: keys in fp32 and scores of so many stay in a core's cache."""
_LEAST_SHARE = 1e-3
"""What a query says of a chunk that it gives nothing."""
_REACH = 4
"""Tokens before the end at which a word counts half, where near ones count most."""
_SATURATION = 1.2
"""BM25's k1: how little a word counts that comes again."""
_SINK = 0.35
"""Values shorter than this share of the median are sinks: first tokens of a text, those that end
one, and in some layers common words (in layers 3 to 10 of SmolLM2-135M nearly every "the").
Every query gives them weight, and they say nothing (Xiao et al. 2023)."""


@dataclass(frozen=True)
class Collection:
    """Entries of documents, one behind the other, that passages are found among."""

    num_entries: tuple[int, ...]
    """Per document."""
    layers: Mapping[int, FrozenMemory]
    """Per layer that finds, the entries. No document goes over the end of a block."""
    read_ids: Callable[[], Tensor] | None = field(default=None, compare=False)
    """Gives the tokens (n,) of all entries, -1 where one is not known; None knows none."""
    median: float | None = None
    """Of the lengths of values, where these entries are a part of more; None is their own."""
    special_ids: tuple[int, ...] = ()
    """Of the tokens that begin, end and fill up texts."""

    @cached_property
    def first_entries(self) -> list[int]:
        """Per document, the number of its first entry; then the number of all."""
        return [0, *accumulate(self.num_entries)]

    @cached_property
    def first_of_chunk(self) -> Tensor:
        """(c,) int64: the first entry of every chunk; none goes over the end of a document."""
        first, num_entries = (
            torch.tensor(numbers, dtype=torch.int64)
            for numbers in (self.first_entries[:-1], self.num_entries)
        )
        num_chunks = -(-num_entries // CHUNK_LEN)
        first -= CHUNK_LEN * (num_chunks.cumsum(0) - num_chunks)
        return first.repeat_interleave(num_chunks) + CHUNK_LEN * torch.arange(int(num_chunks.sum()))

    @cached_property
    def lengths(self) -> Tensor:
        """(n,) fp32 on the CPU: how long the values of each entry are, on average over heads."""
        norms = [torch.zeros(0)]
        for memory in list(self.layers.values())[:1]:
            for block in memory.blocks:
                tiles = block.load().values[0].split(_TILE * CHUNK_LEN, 1)
                norms += [tile.float().norm(dim=-1).mean(0).cpu() for tile in tiles]
        return torch.cat(norms)

    @cached_property
    def is_sink(self) -> Tensor:
        """(n,) bool on the CPU: entries that heads do not look at."""
        if not len(self.lengths):
            return self.lengths.bool()
        median = self.lengths.median() if self.median is None else torch.tensor(self.median)
        return self.lengths < _SINK * median

    @cached_property
    def _known_ids(self) -> Tensor:
        if self.read_ids is None:
            return torch.full((self.first_entries[-1],), -1, dtype=torch.int32)
        return self.read_ids().int()

    @cached_property
    def is_left_out(self) -> Tensor:
        """(n,) bool on the CPU: sinks that are special, or not known, tokens: in no passage.

        What is a word of the text is part of it, however little the layer that finds makes of it.

        Raises:
            MemoryFolderError: a text became other tokens than were read.
        """
        ids = self._known_ids
        special = torch.tensor(self.special_ids, dtype=torch.int32)
        is_word = (ids >= 0) & ~torch.isin(ids, special)
        return self.is_sink & ~is_word if self.layers else torch.zeros_like(is_word)

    @cached_property
    def ids(self) -> Tensor:
        """(n,) int32 on the CPU: the token of every entry; -1 where it is not known, or left out.

        Raises:
            MemoryFolderError: a text became other tokens than were read.
        """
        return self._known_ids.masked_fill(self.is_left_out, -1)

    @cached_property
    def _has_next(self) -> Tensor:
        """(c - 1,) bool: the chunk is followed by another one of its document."""
        return ~torch.isin(self.first_of_chunk[1:], torch.tensor(self.first_entries))

    def join_next(self, values: Tensor) -> Tensor:
        """Values (..., c) of chunks, each with that of the next chunk of its document, if any."""
        joined = values.clone()
        joined[..., :-1] += values[..., 1:] * self._has_next
        return joined

    def find_document(self, entry: int) -> int:
        """The number of the document of an entry."""
        return bisect.bisect_right(self.first_entries, entry) - 1

    def find_chunks(self, entries: Tensor) -> Tensor:
        """Numbers, int64 on the CPU, of the chunks of entries, as many."""
        return torch.searchsorted(self.first_of_chunk, entries.cpu(), right=True) - 1


ChunkSums = Mapping[int, Sequence[tuple[Tensor, Tensor]]]
"""Per layer, numbers (c,) of chunks and the logs (c, F * T) of their sums of exponentials."""


def sum_chunks(
    queries: Mapping[int, Tensor],
    places: Mapping[int, Tensor],
    part: Collection,
    num_neighbors: int,
) -> ChunkSums:
    """What is divided by the total over all collections to be shares of attention.

    Args:
        queries: per layer, (K * G, T, D) of one row, those of a head of keys side by side, free of
            positions, multiplied by the scale of the layer.
        places: per layer, (F,) ascending, which of the K * G find; the others fill a group up.
        part: what is attended to.
        num_neighbors: k, in every block that is not searched exactly.
    """
    return {
        layer: list(_sum_chunks(part, layer, asked, places[layer], num_neighbors))
        for layer, asked in queries.items()
    }


def total_sums(sums: ChunkSums) -> dict[int, Tensor]:
    """Per layer, the log (F * T,) of the sum over all chunks, on the CPU; not of no chunks."""
    return {
        layer: torch.cat([logs for _, logs in found]).logsumexp(0).cpu()
        for layer, found in sums.items()
        if found
    }


def add_sums(totals: Sequence[Mapping[Any, Tensor]]) -> dict[Any, Tensor]:
    """Logs of sums, of several collections, as one of all: per key, of the same shape."""
    keys = dict.fromkeys(key for one in totals for key in one)
    return {
        key: torch.stack([one[key] for one in totals if key in one]).logsumexp(0) for key in keys
    }


def share_out(
    sums: ChunkSums, totals: Mapping[int, Tensor], num_chunks: int, num_queries: int
) -> Tensor:
    """Shares of attention (T, c) fp32 of a collection of so many chunks.

    Those of a query sum to 1 over all collections that `totals` are of.
    """
    shares = torch.zeros(num_chunks, num_queries)
    for layer, found in sums.items():
        for chunks, logs in found:
            total = totals[layer].masked_fill(totals[layer] == -torch.inf, 0.0).to(logs.device)
            by_head = (logs - total).exp().unflatten(1, (-1, num_queries))
            shares.index_add_(0, chunks, by_head.mean(1).cpu())
    return shares.t() / max(1, len(sums))


def _sum_chunks(
    part: Collection, layer: int, asked: Tensor, places: Tensor, num_neighbors: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Numbers (c,) of chunks, and the logs (c, F * T) of the sums of exponentials of scores.

    Of a head's queries, all T stand side by side.
    """
    first = 0
    for block in part.layers[layer].blocks if layer in part.layers else ():
        entries = range(first, first + block.num_entries)
        first, loaded = entries.stop, block.load()
        if isinstance(loaded.index.settings, ExactSettings):
            yield from _sum_all(part, entries, loaded.keys[0], asked, places)
        else:
            yield _sum_nearest(part, entries, loaded, asked, places, num_neighbors)


def _sum_all(
    part: Collection, entries: range, keys: Tensor, asked: Tensor, places: Tensor
) -> Iterator[tuple[Tensor, Tensor]]:
    """As `_sum_chunks`, of all entries of a block, with keys (K, n, D)."""
    head = places // (len(asked) // len(keys))
    columns = {
        number: asked[places[head == number]].flatten(0, 1).float().t()
        for number in head.unique().tolist()
    }
    edges = torch.tensor([entries.start, entries.stop])
    numbers = torch.arange(*torch.searchsorted(part.first_of_chunk, edges).tolist())
    buffer = keys.new_empty(_TILE * CHUNK_LEN, keys.shape[2], dtype=torch.float32)
    for chunks in numbers.split(_TILE) if len(numbers) else ():
        first_of = part.first_of_chunk[chunks]
        start, after = int(first_of[0]), int(chunks[-1]) + 1
        end = int(part.first_of_chunk[after]) if after <= int(numbers[-1]) else entries.stop
        tile = slice(start - entries.start, end - entries.start)
        members = torch.arange(end - start, device=keys.device)
        firsts = (first_of - start).to(keys.device)
        sinks = part.is_sink[start:end].nonzero().flatten().to(keys.device)
        sums = []
        for number, column in columns.items():
            lines = buffer[: end - start].copy_(keys[number, tile])
            scores = torch.mm(lines, column).index_fill_(0, sinks, -torch.inf)
            largest = scores.amax(0).clamp_(min=torch.finfo(torch.float32).min)
            weights = scores.sub_(largest).exp_()
            # Sums over chunks of any length; ten times as fast as `segment_reduce`.
            in_chunk = functional.embedding_bag(members, weights, firsts, mode="sum")
            sums.append(in_chunk.log_().add_(largest))
        yield chunks, torch.cat(sums, 1)


def _sum_nearest(
    part: Collection,
    entries: range,
    block: Memory,
    asked: Tensor,
    places: Tensor,
    num_neighbors: int,
) -> tuple[Tensor, Tensor]:
    """As `_sum_chunks`, of the entries of a block that its index finds nearest to each query."""
    k = min(num_neighbors, len(entries))
    neighbors = block.retrieve(asked.to(block.keys.dtype).unsqueeze(0), k).neighbors
    slots, valid = (found[0][places].flatten(0, 1) for found in (neighbors.slots, neighbors.valid))
    head = places // (len(asked) // block.keys.shape[1])
    keys = block.keys[0][head.repeat_interleave(asked.shape[1]).unsqueeze(1), slots].float()
    # Indexes give scores as the dtype of the keys rounds them.
    scores = torch.bmm(keys, asked[places].flatten(0, 1).float().unsqueeze(2)).squeeze(2)
    numbers = slots.cpu() + entries.start
    hidden = ~valid | part.is_sink[numbers].to(valid.device)
    scores = scores.masked_fill(hidden, -torch.inf)
    largest = scores.amax(1, keepdim=True).clamp_(min=torch.finfo(torch.float32).min)
    chunks, place = part.find_chunks(numbers).unique(return_inverse=True)
    sums = scores.new_zeros(len(scores), len(chunks))
    sums.scatter_add_(1, place.to(scores.device), (scores - largest).exp())
    return chunks, sums.log_().add_(largest).t()


def score_chunks(shares: Tensor) -> Tensor:
    """Scores (..., chunks) of shares of attention (..., T, chunks)."""
    return (shares + _LEAST_SHARE).log().mean(-2)


@dataclass(frozen=True)
class Words:
    """What a text says last: W words. The first are tokens, the others two that stand together."""

    tokens: Tensor
    """(w,) int64: different tokens, ascending."""
    pairs: Tensor
    """(W - w, 2) int64: places of two tokens among these."""
    nearness: Tensor
    """(W,): how near to the end each stands last."""

    @property
    def num(self) -> int:
        """W."""
        return len(self.nearness)


def list_words(ids: Tensor) -> Words:
    """The words of the tokens (n,) of a text. Tokens below 0 are none, nor part of a pair."""
    weights = 1 / (1 + torch.arange(len(ids) - 1, -1, -1) / _REACH)
    is_known = ids >= 0
    both = (is_known[:-1] & is_known[1:]).nonzero().flatten()
    tokens, place = ids[is_known].long().unique(return_inverse=True)
    place = torch.zeros(len(ids), dtype=torch.int64).masked_scatter_(is_known, place)
    pairs, place_of_pair = torch.stack([place[both], place[both + 1]], 1).unique(
        dim=0, return_inverse=True
    )
    nearness = torch.zeros(len(tokens) + len(pairs))
    nearness.scatter_reduce_(0, place[is_known], weights[is_known], "amax")
    nearness.scatter_reduce_(0, len(tokens) + place_of_pair, weights[both + 1], "amax")
    return Words(tokens, pairs, nearness)


def weigh_words(words: Words, holding: Tensor, num_chunks: int) -> Tensor:
    """What each word counts (W, 2), alike and by nearness; `holding` (W,) of all chunks have it."""
    rarity = torch.log1p((num_chunks - holding + 0.5) / (holding + 0.5))
    return torch.stack([rarity, rarity * words.nearness], 1)


def match_words(part: Collection, counts: Tensor, weights: Tensor) -> Tensor:
    """BM25 (4, c) fp32: (2, c) of every chunk alone, and of it with the next.

    Nothing is indexed: a text that is written is a collection too, and is another one every time.

    Args:
        part: the chunks.
        counts: those of `count_words`.
        weights: those of `weigh_words`.
    """
    each = torch.stack([counts, part.join_next(counts)])
    each /= each + _SATURATION
    return ((_SATURATION + 1) * weights.t() @ each).flatten(0, 1)


def count_words(words: Words, part: Collection) -> Tensor:
    """How often (W, c) fp32 every word ends in every chunk."""
    num_chunks, num_tokens = len(part.first_of_chunk), len(words.tokens)
    if not num_chunks or not num_tokens:
        return torch.zeros(words.num, num_chunks)
    # The last place is that of -1; a token that is not looked for makes no pair.
    number = torch.full((2 + max(int(words.tokens.max()), int(part.ids.max())),), num_tokens)
    number[words.tokens] = torch.arange(num_tokens)
    found = number[part.ids]
    pair = torch.full((num_tokens + 1, num_tokens + 1), -1)
    pair[words.pairs[:, 0], words.pairs[:, 1]] = torch.arange(num_tokens, words.num)
    ends = (found < num_tokens).nonzero().flatten()
    chunks = part.find_chunks(ends)
    # The first entry of a document has none before it.
    first = torch.tensor(part.first_entries)
    before = found.roll(1).index_fill_(0, first[first < len(found)], num_tokens)[ends]
    pairs = pair[before, found[ends]]
    cells = torch.cat(
        [found[ends] * num_chunks + chunks, (pairs * num_chunks + chunks)[pairs >= 0]]
    )
    return cells.bincount(minlength=words.num * num_chunks).view(-1, num_chunks).float()


def rank_part(shares: Tensor, matches: Tensor, total: Tensor) -> Tensor:
    """Scores (c,) of chunks; -inf where neither heads nor words say a thing.

    Args:
        shares: of attention (T, c) of every chunk with the next.
        matches: those of `match_words`.
        total: (4,), logs of the sums of exponentials of the matches of all collections.
    """
    told = (matches - total.unsqueeze(1)).exp().mean(0).add(_LEAST_SHARE).log()
    is_nothing = (shares == 0).all(0) & (matches == 0).all(0)
    return (score_chunks(shares) + told).masked_fill(is_nothing, -torch.inf)


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
    """Share of attention of this chunk and the next, on average."""
    value: float = 0.0
    """Score of this chunk, by which spans are chosen."""


def choose_among(spans: Sequence[Span], num_passages: int, margin: float) -> list[Span]:
    """The best of what was chosen in several collections, best first.

    Of equal ones, the later collection comes first, and in it the later chunk.

    Args:
        spans: of all of them.
        num_passages: at most.
        margin: chunks whose score is so much lower than that of the best are not chosen.
    """
    best = sorted(spans, key=lambda one: (one.value, one.collection, one.chunk), reverse=True)
    return [one for one in best if one.value >= best[0].value - margin][:num_passages]


def choose_in(
    part: Collection,
    shares: Tensor,
    scores: Tensor,
    num_passages: int,
    passage_len: int,
    *,
    is_written: bool = False,
) -> list[Span]:
    """Spans around the best chunks, best first, inside their documents; no two overlap.

    Args:
        part: what they are chosen from.
        shares: see `rank_part`.
        scores: those of its chunks (c,); -inf is never chosen.
        num_passages: at most.
        passage_len: entries of each, at most, a quarter of them before the chunk: what stands
            before it tells the place, and a quote goes on behind it.
        is_written: for a text that is written on, which has just said what stands before the chunk:
            it begins with the chunk, and is exchanged half as often.
    """
    num_before = 0 if is_written else passage_len // 4
    # A passage overlaps at most so many chunks besides its own.
    most = num_passages * (2 * (passage_len // CHUNK_LEN) + 3)
    best = scores.topk(min(most, len(scores)))
    first = part.first_of_chunk[best.indices].tolist()
    mean = shares[:, best.indices].mean(0).tolist()
    chosen: list[Span] = []
    for value, chunk, share in sorted(
        zip(best.values.tolist(), first, mean, strict=True), reverse=True
    ):
        if len(chosen) == num_passages or value == -torch.inf:
            break
        document = part.find_document(chunk)
        first_of, last = part.first_entries[document], part.first_entries[document + 1]
        start = max(first_of, min(chunk - num_before, last - passage_len))
        end = min(last, start + passage_len)
        if all(end <= other.start or other.end <= start for other in chosen):
            chosen.append(Span(0, document, start, end, chunk, share, value))
    return chosen
