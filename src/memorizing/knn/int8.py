"""Search among keys of 8 bits: half of the bytes, and products of integers.

Shapes: B rows, H heads, T queries, N slots, D head_dim, k neighbors.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from memorizing.errors import ConfigError
from memorizing.index_settings import Int8Settings
from memorizing.knn.index import KeyIndex, StoredKeys, merge_candidates
from memorizing.knn.packed import MOST_NEIGHBORS, ScoreTile, select_packed


class Int8Index(KeyIndex):
    """Codes round(key / scale) with scale = max |key| / 127 of each key; queries alike.

    The products of codes, times the scale of the key, rank the candidates; `oversample` times k of
    them are scored again in fp32 with the stored keys. The codes are a copy beside these: D + 4
    bytes an entry and head. `search` raises a ConfigError where `oversample` times k is more than
    can be ranked.
    """

    def __init__(self, settings: Int8Settings) -> None:
        """Make an index without codes."""
        super().__init__(settings)
        self.oversample = settings.oversample
        self._codes: Tensor | None = None
        self._scales: Tensor | None = None
        self._num_coded: list[int] = []

    def append(self, stored: StoredKeys) -> None:
        """As `KeyIndex.append`: codes for what is new, O(segment).

        Raises:
            ConfigError: keys that are not on a CPU.
        """
        if stored.keys.device.type != "cpu":
            raise ConfigError(
                f"the index int8 searches on a CPU, and the memory is on {stored.keys.device}; "
                "use the index exact there"
            )
        if self._codes is None or self._scales is None:
            with torch.inference_mode(False):
                self._codes = torch.zeros(stored.keys.shape, dtype=torch.int8)
                self._scales = torch.zeros(*stored.keys.shape[:3], 1)
            self._num_coded = [0] * stored.keys.shape[0]
        for row, count in enumerate(stored.num_appended):
            first = max(self._num_coded[row], count - stored.capacity)
            slots = torch.arange(first, count) % stored.capacity
            codes, scales = encode_int8(stored.keys[row][:, slots])
            self._codes[row].index_copy_(1, slots, codes)
            self._scales[row].index_copy_(1, slots, scales)
            self._num_coded[row] = count

    def reset(self, rows: Sequence[int]) -> None:
        """As `KeyIndex.reset`."""
        for row in rows:
            if self._num_coded:
                self._num_coded[row] = 0

    def _search_row(
        self, queries: Tensor, stored: StoredKeys, row: int, k: int, num_hidden: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        size = stored.sizes[row]
        num_candidates = min(self.oversample * k, size)
        if num_candidates > MOST_NEIGHBORS:
            raise ConfigError(
                f"the index int8 ranks {num_candidates:,} candidates; it can rank up to "
                f"{MOST_NEIGHBORS:,}: lower num_neighbors or int8.oversample"
            )
        assert self._codes is not None
        assert self._scales is not None
        codes, scales = self._codes[row], self._scales[row]
        asked = encode_int8(queries)[0]

        def score(heads: slice, span: slice) -> ScoreTile:
            lines, factors = codes[heads], scales[heads]
            columns = asked[heads, span].transpose(1, 2)

            def score_tile(head: int, start: int, stop: int, out: Tensor) -> None:
                products = torch._int_mm(  # pyright: ignore[reportPrivateImportUsage]
                    lines[head, start:stop], columns[head]
                )
                # The factor of the query is left out: it does not change its ranking.
                out.copy_(products * factors[head, start:stop])

            return score_tile

        shape = (queries.shape[0], queries.shape[1], size)
        scores, slots = select_packed(
            score, shape, torch.bfloat16, num_candidates, stored.newest_slots[row], num_hidden
        )
        candidates = slots.masked_fill(scores == -math.inf, -1)
        best, exact_scores = merge_candidates(queries, stored, row, candidates, k)
        return exact_scores.to(stored.keys.dtype), best

    def load(self, folder: Path, stored: StoredKeys) -> None:
        """Make the codes anew. Changes the index in place."""
        self.reset(range(len(self._num_coded)))
        self.append(stored)


def encode_int8(vectors: Tensor) -> tuple[Tensor, Tensor]:
    """Codes round(x / scale) (..., D) int8 and scales max |x| / 127 (..., 1) fp32.

    A decoded number, code times scale, differs by at most half a scale.
    """
    wide = vectors.float()
    scales = wide.abs().amax(-1, keepdim=True) / 127
    codes = (wide / scales.masked_fill(scales == 0, 1.0)).round()
    return codes.clamp(-127, 127).to(torch.int8), scales
