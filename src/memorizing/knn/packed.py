"""The fast search on CPUs: little more than the matrix product of keys and queries.

Four things make it fast:

1. The product is taken as keys x queries, a tile of keys at a time. The scores of all queries with
   one key are then a contiguous line, and the maxima of buckets of neighboring slots are taken of
   them, vertically, while the tile is in the cache.
2. Maxima of 16-bit scores are taken of their bits as integers, which is several times faster:
   floats that are not negative have the order of their bits. Where fewer than k buckets have a
   maximum that is not negative, all bits are first turned so that both signs have it.
3. Maxima are taken of maxima, until a few hundred are left. From there down, the k best buckets are
   kept and opened. This is exact: a bucket that holds one of the true top k has a maximum at least
   as large, and fewer than k buckets can exceed it.
4. What is chosen from is packed: a score's bits above its place, one integer, so that NumPy's
   vectorized sort of integers does it.

Shapes: H heads, T queries, N slots, D head_dim, k neighbors.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from memorizing.knn.plain import sort_newest_first
from memorizing.knn.product import multiply_into, widen_for_product

_TILE_BYTES = 2 * 2**20
"""Scores of one tile of keys, per thread: about what a core's own cache holds."""

_WORKSPACE_BYTES = 128 * 2**20
"""Scores of the queries that are searched together, unless 16 queries have more; kept from call to
call, in each thread. Queries are split by this limit, and heads are put together by the next one:
at 65,536 keys in bf16 one head of 512 queries goes at a time, at 8,192 two heads, at 262,144 half
of a head's queries."""

_SHARED_BYTES = 16 * 2**20
"""Scores of several heads are searched together up to what a shared cache holds."""

_NUM_TOP = 256
"""Maxima that are left on the highest level, or 4 k."""

MOST_NEIGHBORS = 2048
"""With larger k, places of candidates might not fit their 16 bits."""

_LEAST_QUERIES = 16
"""As many queries are searched together as there are, or at least so many: every part of them
reads all keys."""

_local = threading.local()

ScoreTile = Callable[[int, int, int, Tensor], None]
"""Writes the scores of head h and slots from start to stop, (stop - start, T), into a tensor."""


def can_pack(k: int, keys: Tensor) -> bool:
    """Whether this search knows so many neighbors and these keys."""
    return (
        keys.device.type == "cpu"
        and keys.dtype in (torch.bfloat16, torch.float16, torch.float32)
        and k <= MOST_NEIGHBORS
    )


def search_packed(
    queries: Tensor, keys: Tensor, k: int, newest: int, num_hidden: Tensor | None
) -> tuple[Tensor, Tensor]:
    """As `search_plainly`, where `can_pack` allows it."""

    def score(heads: slice, span: slice) -> ScoreTile:
        lines, columns = keys[heads], widen_for_product(queries[heads, span]).transpose(1, 2)

        def score_tile(head: int, start: int, stop: int, out: Tensor) -> None:
            multiply_into(out, lines[head, start:stop], columns[head])

        return score_tile

    shape = (queries.shape[0], queries.shape[1], keys.shape[1])
    return select_packed(score, shape, keys.dtype, k, newest, num_hidden)


def select_packed(
    score: Callable[[slice, slice], ScoreTile],
    shape: tuple[int, int, int],
    dtype: torch.dtype,
    k: int,
    newest: int,
    num_hidden: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """The k best of scores that are made tile by tile.

    Args:
        score: for some heads and queries, what writes the scores of a tile of keys.
        shape: H, T, N.
        dtype: of the scores.
        k: how many, at most N.
        newest: the slot written last.
        num_hidden: (T,): how many of the newest entries a query must not see.

    Returns:
        Scores and slots, each (H, T, k), best first.
    """
    num_heads, num_queries, size = shape
    scores = torch.empty(num_heads, num_queries, k, dtype=dtype)
    slots = torch.empty_like(scores, dtype=torch.int64)
    lens = _plan_levels(size, k)
    width = -(-size // math.prod(lens)) * math.prod(lens)
    for heads, span in _iterate_parts(num_heads, num_queries, width * dtype.itemsize):
        found = scores[heads, span]
        search = _Search((found.shape[0], width, found.shape[1]), size, dtype, lens, newest)
        search.fill(score(heads, span), None if num_hidden is None else num_hidden[span])
        scores[heads, span], slots[heads, span] = search.select(k)
    return scores, slots


def _plan_levels(size: int, k: int) -> tuple[int, ...]:
    """Lengths of the buckets of every level, from the scores upwards."""
    num_top = max(_NUM_TOP, 4 * k)
    lens: list[int] = []
    left = size
    while left > 2 * num_top:
        longest = 8 if lens or size <= 2**15 else 16
        lens.append(min(longest, 2 ** round(math.log2(left / num_top))))
        left = -(-left // lens[-1])
    return tuple(lens)


def _iterate_parts(
    num_heads: int, num_queries: int, bytes_per_query: int
) -> Iterator[tuple[slice, slice]]:
    """Split heads x queries into parts whose scores fit the workspace."""
    num_together = max(_LEAST_QUERIES, _WORKSPACE_BYTES // bytes_per_query)
    if num_together >= num_queries:
        step = max(1, _SHARED_BYTES // (bytes_per_query * num_queries))
        for head in range(0, num_heads, step):
            yield slice(head, head + step), slice(None)
    else:
        num_spans = -(-num_queries // num_together)
        span_len = -(-num_queries // num_spans)
        for head in range(num_heads):
            for start in range(0, num_queries, span_len):
                yield slice(head, head + 1), slice(start, start + span_len)


class _Search:
    """All scores of some heads and queries, and their maxima level by level."""

    def __init__(
        self,
        shape: tuple[int, int, int],
        size: int,
        dtype: torch.dtype,
        lens: tuple[int, ...],
        newest: int,
    ) -> None:
        """Borrow the workspace for scores of `shape`: heads, lines (`size` keys), queries."""
        self.lens, self.size, self.newest, self.dtype = lens, size, newest, dtype
        self.bits_dtype = torch.int32 if dtype == torch.float32 else torch.int16
        self.scores = _borrow_workspace(shape, dtype)
        self.scores[:, size:] = -math.inf
        # Until they are turned, bits have the order of the scores that are not negative only.
        self.is_turned = False
        self.maxima = self._make_maxima() if lens else None

    def fill(self, score_tile: ScoreTile, num_hidden: Tensor | None) -> None:
        """Make all scores, and the maxima of each tile while it is in the cache."""
        for head, start, stop in self._iterate_tiles():
            end = min(stop, self.size)
            score_tile(head, start, end, self.scores[head, start:end])
            if self.dtype == torch.float32:
                # -0.0 becomes 0.0: they are equal, but their bits are not.
                self.scores[head, start:end] += 0.0
            if num_hidden is not None:
                self._hide(head, start, end, num_hidden)
            self._reduce_tile(head, start, stop)

    def _make_maxima(self) -> Tensor:
        heads, width, num_queries = self.scores.shape
        dtype = self.dtype if self.dtype == torch.float32 else self.bits_dtype
        return torch.empty(heads, width // self.lens[0], num_queries, dtype=dtype)

    def _iterate_tiles(self) -> Iterator[tuple[int, int, int]]:
        heads, width, num_queries = self.scores.shape
        num_lines = _TILE_BYTES * torch.get_num_threads() // (num_queries * self.dtype.itemsize)
        step = math.prod(self.lens)
        step *= max(1, num_lines // step)
        for head in range(heads):
            for start in range(0, width, step):
                yield head, start, min(start + step, width)

    def _hide(self, head: int, start: int, end: int, num_hidden: Tensor) -> None:
        """Set the scores of the newest `num_hidden[t]` entries of the tile to -inf, in place."""
        most = int(num_hidden.max())
        ages = (self.newest - torch.arange(start, end)) % self.size
        lines = (ages < most).nonzero().flatten()
        if len(lines):
            tile = self.scores[head, start:end]
            hide = ages[lines].unsqueeze(1) < num_hidden
            tile[lines] = tile[lines].masked_fill(hide, -math.inf)

    def _reduce_tile(self, head: int, start: int, stop: int) -> None:
        if self.maxima is None:
            return
        tile = self.scores[head, start:stop]
        if self.maxima.dtype != self.dtype:
            tile = tile.view(self.bits_dtype)
        bucket_len = self.lens[0]
        lines = slice(start // bucket_len, stop // bucket_len)
        torch.amax(tile.view(-1, bucket_len, tile.shape[1]), 1, out=self.maxima[head, lines])

    def select(self, k: int) -> tuple[Tensor, Tensor]:
        """The k best scores (H, T, k) and their slots, best first."""
        if self.maxima is None:
            places = torch.arange(self.size, dtype=torch.int32).expand(
                self.scores.shape[0], self.scores.shape[2], -1
            )
            return self._finish(places, k, None)
        levels = [self.maxima]
        for bucket_len in self.lens[1:]:
            heads, _, num_queries = levels[-1].shape
            levels.append(levels[-1].view(heads, -1, bucket_len, num_queries).amax(2))
        packed = self._rank(self._read(levels[-1], None), k + 1)
        if self.dtype != torch.float32 and bool((packed[..., 1] < 0).any()) and not self.is_turned:
            self._turn()
            return self.select(k)
        places, excluded = self._split(packed)
        for level, bucket_len in zip(levels[-2::-1], self.lens[:0:-1], strict=True):
            members = _open_buckets(places, bucket_len)
            packed = self._rank(self._read(level, members), k + 1)
            chosen, best_excluded = self._split(packed)
            places = members.gather(-1, chosen.long())
            excluded = torch.maximum(excluded, best_excluded)
        return self._finish(_open_buckets(places, self.lens[0]), k, excluded)

    def _turn(self) -> None:
        """Turn the bits so that they have the order of the scores of both signs, in place."""
        self.is_turned = True
        bits = self.scores.view(self.bits_dtype)
        for head, start, stop in self._iterate_tiles():
            tile = bits[head, start:stop]
            tile ^= (tile >> 15) & 0x7FFF
            self._reduce_tile(head, start, stop)

    def _read(self, level: Tensor, places: Tensor | None) -> Tensor:
        """Bits (H, T, n) with the order of the scores, of all lines of a level or at the places."""
        lines = level.transpose(1, 2)
        values = lines.contiguous() if places is None else lines.gather(-1, places.long())
        bits = values.view(self.bits_dtype)
        return bits if self.is_turned else _turn_bits(bits)

    def _rank(self, bits: Tensor, k: int) -> Tensor:
        """The k largest of n, ascending, packed: bits above, place below."""
        places = torch.arange(bits.shape[-1], dtype=torch.int32)
        return _sort_packed(bits, places)[..., -k:]

    def _split(self, packed: Tensor) -> tuple[Tensor, Tensor]:
        """Places of the k largest of k + 1, and the bits of the one left out (for ties in fp32)."""
        shift = 8 * self.bits_dtype.itemsize
        return packed[..., 1:] & ((1 << shift) - 1), packed[..., 0] >> shift

    def _finish(self, slots: Tensor, k: int, excluded: Tensor | None) -> tuple[Tensor, Tensor]:
        """Sort the candidates: scores and slots (H, T, k), best first."""
        bits = self._read(self.scores, slots)
        if self.dtype != torch.float32:
            packed = self._rank(bits, k)
            chosen = slots.gather(-1, (packed & 0xFFFF).long()).long()
            best = _turn_bits((packed >> 16).to(torch.int16)).view(self.dtype)
            return best.flip(-1), chosen.flip(-1)
        # Below the bits stands how new an entry is, which tells its slot as well.
        newness = (slots - self.newest - 1) % self.size
        packed = _sort_packed(bits, newness.where(slots < self.size, 0))[..., -k:].flip(-1)
        best_bits = packed >> 32
        best = _turn_bits(best_bits.int()).view(torch.float32)
        chosen = ((packed & 0xFFFFFFFF) + self.newest + 1) % self.size
        if excluded is not None:
            # An entry of the same score may be newer than one that was kept.
            head, query = (best_bits[..., -1] <= excluded).nonzero(as_tuple=True)
            if len(head):
                best[head, query], chosen[head, query] = sort_newest_first(
                    self.scores[head, : self.size, query], k, self.newest
                )
        return best, chosen


def _borrow_workspace(shape: tuple[int, int, int], dtype: torch.dtype) -> Tensor:
    """A buffer of this thread, of any content. A search is done with it before the next begins."""
    num_bytes = math.prod(shape) * dtype.itemsize
    held = getattr(_local, "workspace", None)
    if held is None or held.numel() < num_bytes:
        # A buffer made in inference mode could not be written to outside of it.
        with torch.inference_mode(False):
            held = _local.workspace = torch.empty(num_bytes, dtype=torch.uint8)
    return held[:num_bytes].view(dtype).view(shape)


def _open_buckets(buckets: Tensor, bucket_len: int) -> Tensor:
    """Members (H, T, k * bucket_len) of buckets (H, T, k) of neighboring lines."""
    offsets = torch.arange(bucket_len, dtype=buckets.dtype)
    return ((buckets * bucket_len).unsqueeze(-1) + offsets).flatten(-2)


def _turn_bits(bits: Tensor) -> Tensor:
    """Bits of floats as integers with the order of the floats. Its own inverse."""
    most = torch.iinfo(bits.dtype).max
    return bits ^ ((bits >> (8 * bits.dtype.itemsize - 1)) & most)


def _sort_packed(bits: Tensor, below: Tensor) -> Tensor:
    """Sort integers of bits above and what stands below them, over the last dimension."""
    wide = torch.int32 if bits.dtype == torch.int16 else torch.int64
    packed = bits.to(wide, memory_format=torch.contiguous_format)
    packed <<= 8 * bits.dtype.itemsize
    packed |= below.to(wide)
    packed.numpy().sort(axis=-1)
    return packed
