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

Keys of 16 bits are scored in fp32 where the processor emulates their products, which takes no
longer. Where it multiplies them, scores of 16 bits are a sieve: what rounds to the k-th score is
scored again in fp32, and a query for which more does than was kept is searched in fp32.

Shapes: H heads, T queries, N slots, D head_dim, k neighbors.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator
from functools import cache

import torch
from torch import Tensor

from memorizing.knn.plain import sort_newest_first

_TILE_BYTES = 2 * 2**20
"""Scores of one tile of keys, per thread: about what a core's own cache holds."""

_WORKSPACE_BYTES = 128 * 2**20
"""Scores of the queries that are searched together, unless 16 queries have more; kept from call to
call, in each thread. Queries are split by this limit, and heads are put together by the next one:
at 65,536 keys in bf16 one head of 512 queries goes at a time, at 8,192 two heads, at 262,144 half
of a head's queries."""

_SHARED_BYTES = 32 * 2**20
"""Scores of several heads are searched together up to what a shared cache holds."""

_NUM_TOP = 256
"""Maxima that are left on the highest level, or 4 k."""

MOST_NEIGHBORS = 2048
"""With larger k, places of candidates might not fit their 16 bits."""

_NUM_SPARE = 8
"""Scores of 16 bits that are kept beyond the k-th, to see all that round to it: on random keys
0.1% of the queries had more among 65,536."""

_LEAST_QUERIES = 16
"""As many queries are searched together as there are, or at least so many: every part of them
reads all keys."""

_local = threading.local()

ScoreTile = Callable[[int, int, int, Tensor], None]
"""Writes the scores of head h and slots from start to stop, (stop - start, T), into a tensor."""


_FIRST_WITH_BF16 = (8, 0)
"""Compute capability of the first NVIDIA GPUs with bf16 units."""


@cache
def is_emulated(dtype: torch.dtype) -> bool:
    """Whether CPU products of a 16-bit dtype run without the processor's vector units.

    Without AVX-512 (most laptops), torch multiplies bf16 and fp16 element by element, 20 to 150
    times slower than fp32. Asked of torch and not timed, so that a machine always rounds alike.
    """
    if dtype == torch.bfloat16:
        return not torch.ops.mkldnn._is_mkldnn_bf16_supported()
    if dtype == torch.float16:
        return not torch.ops.mkldnn._is_mkldnn_fp16_supported()
    return False


def multiplies_bf16(device: torch.device) -> bool:
    """Whether a device has units for bf16 products: CPUs that do not emulate them, newer GPUs."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= _FIRST_WITH_BF16
    return device.type == "cpu" and not is_emulated(torch.bfloat16)


def can_pack(k: int, keys: Tensor) -> bool:
    """Whether this search knows so many neighbors and these keys."""
    return (
        keys.device.type == "cpu"
        and keys.dtype in (torch.bfloat16, torch.float16, torch.float32)
        and k + _NUM_SPARE <= MOST_NEIGHBORS
    )


def search_packed(
    queries: Tensor, keys: Tensor, k: int, newest: int, num_hidden: Tensor | None
) -> tuple[Tensor, Tensor]:
    """As `search_plainly`, where `can_pack` allows it."""
    size = keys.shape[1]
    if keys.dtype == torch.float32 or is_emulated(keys.dtype) or k == size:
        return _search(queries, keys, k, newest, num_hidden, torch.float32)
    found = _search(queries, keys, min(k + _NUM_SPARE, size), newest, num_hidden, keys.dtype)
    scores, slots, is_open = _settle_ties(queries, keys, *found, k)
    for head in is_open.any(-1).nonzero().flatten().tolist() if found[0].shape[-1] < size else ():
        (asked,) = is_open[head].nonzero(as_tuple=True)
        hidden = None if num_hidden is None else num_hidden[asked]
        part = slice(head, head + 1)
        scores[head, asked], slots[head, asked] = (
            one[0].to(into.dtype)
            for one, into in zip(
                _search(queries[part, asked], keys[part], k, newest, hidden, torch.float32),
                (scores, slots),
                strict=True,
            )
        )
    return scores, slots


def _search(
    queries: Tensor,
    keys: Tensor,
    k: int,
    newest: int,
    num_hidden: Tensor | None,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Scores and slots (H, T, k) by products in `dtype`, that of the keys or fp32."""

    def score(heads: slice, span: slice) -> ScoreTile:
        lines, columns = keys[heads], queries[heads, span].to(dtype).transpose(1, 2)

        def score_tile(head: int, start: int, stop: int, out: Tensor) -> None:
            tile = lines[head, start:stop]
            if tile.dtype != dtype:
                # Fresh pages would cost more than the product.
                tile = _borrow_buffer("lines", tuple(tile.shape), dtype).copy_(tile)
            torch.mm(tile, columns[head], out=out)

        return score_tile

    shape = (queries.shape[0], queries.shape[1], keys.shape[1])
    # Of 16-bit keys, ties are not sorted: equal keys may be many.
    return select_packed(
        score, shape, dtype, k, newest, num_hidden, sorts_ties=keys.dtype == torch.float32
    )


def _settle_ties(
    queries: Tensor, keys: Tensor, scores: Tensor, slots: Tensor, k: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The k best in fp32 of candidates (H, T, C) that are ordered by rounded scores.

    Rounding keeps the order: only what rounds to the k-th score is scored again.

    Returns:
        Scores and slots, (H, T, k), and (H, T) bool: where what was left out may do so as well.
    """
    kth = scores[..., k - 1 : k]
    is_tied = (scores == kth) & (kth > -math.inf)
    head, query, place = is_tied.nonzero(as_tuple=True)
    tied_keys = keys[head, slots[head, query, place]].float()
    ranks = torch.where(scores > kth, math.inf, -math.inf)
    ranks[head, query, place] = (tied_keys * queries[head, query].float()).sum(-1)
    kept = ranks.topk(k, dim=-1).indices.sort(-1).values
    return scores.gather(-1, kept), slots.gather(-1, kept), is_tied[..., -1]


def select_packed(
    score: Callable[[slice, slice], ScoreTile],
    shape: tuple[int, int, int],
    dtype: torch.dtype,
    k: int,
    newest: int,
    num_hidden: Tensor | None,
    *,
    sorts_ties: bool = False,
) -> tuple[Tensor, Tensor]:
    """The k best of scores that are made tile by tile.

    Args:
        score: for some heads and queries, what writes the scores of a tile of keys.
        shape: H, T, N.
        dtype: of the scores.
        k: how many, at most N.
        newest: the slot written last.
        num_hidden: (T,): how many of the newest entries a query must not see.
        sorts_ties: whether, of equal scores in fp32, the newest must be found.

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
        search = _Workspace((found.shape[0], width, found.shape[1]), size, dtype, lens, newest)
        search.fill(score(heads, span), None if num_hidden is None else num_hidden[span])
        scores[heads, span], slots[heads, span] = search.select(k, sorts_ties)
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


class _Workspace:
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
        self.scores = _borrow_buffer("workspace", shape, dtype)
        self.scores[:, size:] = -math.inf
        # Until they are turned, bits have the order of the scores that are not negative only.
        self.is_turned = False
        self.maxima = self._make_maxima() if lens else None

    def fill(self, score_tile: ScoreTile, num_hidden: Tensor | None) -> None:
        """Make all scores, and the maxima of each tile while it is in the cache."""
        for head, start, stop in self._iterate_tiles():
            end = min(stop, self.size)
            score_tile(head, start, end, self.scores[head, start:end])
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

    def select(self, k: int, sorts_ties: bool) -> tuple[Tensor, Tensor]:
        """The k best scores (H, T, k) and their slots, best first."""
        heads, _, num_queries = self.scores.shape
        if self.maxima is None:
            slots = torch.arange(self.size, dtype=torch.int32).expand(heads, num_queries, -1)
            nothing = torch.full((heads, num_queries), torch.iinfo(torch.int64).min)
            return self._finish(slots, k, nothing if sorts_ties else None)
        levels = [self.maxima]
        for bucket_len in self.lens[1:]:
            levels.append(levels[-1].view(heads, -1, bucket_len, num_queries).amax(2))
        packed = self._rank(self._read(levels[-1], None), k + 1)
        if self.dtype != torch.float32 and not self.is_turned and bool((packed[..., 1:] < 0).any()):
            self._turn()
            return self.select(k, sorts_ties)
        places, excluded = self._split(packed)
        for level, bucket_len in zip(levels[-2::-1], self.lens[:0:-1], strict=True):
            members = _open_buckets(places, bucket_len)
            packed = self._rank(self._read(level, members), k + 1)
            chosen, best_excluded = self._split(packed)
            places = members.gather(-1, chosen.long())
            excluded = torch.maximum(excluded, best_excluded)
        return self._finish(
            _open_buckets(places, self.lens[0]), k, excluded if sorts_ties else None
        )

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
        if self.dtype == torch.float32:
            values += 0.0  # -0.0 becomes 0.0: they are equal, but their bits are not
        bits = values.view(self.bits_dtype)
        return bits if self.is_turned else _turn_bits(bits)

    def _rank(self, bits: Tensor, k: int) -> Tensor:
        """As `_take_largest`, of bits above their places."""
        return _take_largest(bits, torch.arange(bits.shape[-1], dtype=torch.int32), k)

    def _split(self, packed: Tensor) -> tuple[Tensor, Tensor]:
        """Places of the k largest of k + 1, and the bits of the one left out (for ties in fp32)."""
        shift = 8 * self.bits_dtype.itemsize
        return packed[..., 1:] & ((1 << shift) - 1), packed[..., 0] >> shift

    def _finish(self, slots: Tensor, k: int, excluded: Tensor | None) -> tuple[Tensor, Tensor]:
        """Sort the candidates: scores and slots (H, T, k), best first.

        With `excluded`, the best bits that are not among them, equal scores are newest first.
        """
        bits = self._read(self.scores, slots)
        shift = 8 * self.bits_dtype.itemsize
        if excluded is None:
            packed = self._rank(bits, k)
        else:
            # Below the bits stands how new an entry is, which tells its slot as well.
            newness = (slots - self.newest - 1) % self.size
            packed = _take_largest(bits, newness.where(slots < self.size, 0), k)
        packed = packed.sort(-1, descending=True).values
        below = (packed & ((1 << shift) - 1)).long()
        best_bits = packed >> shift
        best = _turn_bits(best_bits.to(self.bits_dtype)).view(self.dtype)
        if excluded is None:
            return best, slots.gather(-1, below).long()
        chosen = (below + self.newest + 1) % self.size
        # An entry of the same score may be newer than one that was kept.
        head, query = (best_bits[..., -1] <= excluded).nonzero(as_tuple=True)
        if len(head):
            best[head, query], chosen[head, query] = sort_newest_first(
                self.scores[head, : self.size, query], k, self.newest
            )
        return best, chosen


def _borrow_buffer(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """A buffer of this thread, of any content. What has it is done before the next borrows it."""
    num_bytes = math.prod(shape) * dtype.itemsize
    held = getattr(_local, name, None)
    if held is None or held.numel() < num_bytes:
        # A buffer made in inference mode could not be written to outside of it.
        with torch.inference_mode(False):
            # A memory that grows asks for a little more each time: fresh pages cost as much as the
            # selection.
            held = torch.empty(1 << (num_bytes - 1).bit_length(), dtype=torch.uint8)
        setattr(_local, name, held)
    return held[:num_bytes].view(dtype).view(shape)


def _open_buckets(buckets: Tensor, bucket_len: int) -> Tensor:
    """Members (H, T, k * bucket_len) of buckets (H, T, k) of neighboring lines."""
    offsets = torch.arange(bucket_len, dtype=buckets.dtype)
    return ((buckets * bucket_len).unsqueeze(-1) + offsets).flatten(-2)


def _turn_bits(bits: Tensor) -> Tensor:
    """Bits of floats as integers with the order of the floats. Its own inverse."""
    most = torch.iinfo(bits.dtype).max
    return bits ^ ((bits >> (8 * bits.dtype.itemsize - 1)) & most)


def _take_largest(bits: Tensor, below: Tensor, k: int) -> Tensor:
    """The k largest, over the last dimension, of integers of bits above and what stands below them.

    The smallest of them first, the others in any order.
    """
    wide = torch.int32 if bits.dtype == torch.int16 else torch.int64
    packed = bits.to(wide, memory_format=torch.contiguous_format)
    packed <<= 8 * bits.dtype.itemsize
    packed |= below.to(wide)
    packed.numpy().partition(packed.shape[-1] - k, axis=-1)
    return packed[..., -k:]
