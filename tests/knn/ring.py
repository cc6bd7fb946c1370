"""A ring of keys as a memory keeps it, with a deque beside it as the oracle."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

import torch
from torch import Tensor

from memorizing.index_settings import ExactSettings, parse_index
from memorizing.knn import KeyIndex, Neighbors, StoredKeys, make_index, recall_at_k


def draw_keys(*shape: int, seed: int = 0, clusters: int = 0) -> Tensor:
    """Normalized random vectors, around `clusters` centers of each head where that is not 0."""
    generator = torch.Generator().manual_seed(seed)
    keys = torch.randn(shape, generator=generator)
    if clusters:
        generator = torch.Generator().manual_seed(97)
        centers = torch.randn(shape[1], clusters, shape[-1], generator=generator)
        chosen = torch.randint(clusters, shape[:-1], generator=generator)
        heads = torch.arange(shape[1]).view(1, -1, 1)
        keys = centers[heads, chosen] + 0.3 * keys
    return torch.nn.functional.normalize(keys, dim=-1)


def search_exact(
    queries: Tensor,
    keys: Tensor,
    num_appended: Sequence[int],
    k: int,
    num_hidden: Tensor | None = None,
) -> Neighbors:
    """Exact search of keys (B, H, N, D) of which so many were appended to each row."""
    stored = StoredKeys(keys, tuple(num_appended))
    return make_index(ExactSettings()).search(queries, stored, k, num_hidden=num_hidden)


class Ring:
    """Rows of slots, an index that is told of every change, and what must be there."""

    def __init__(
        self, index: str, shape: tuple[int, int, int, int], dtype: torch.dtype = torch.float32
    ) -> None:
        # What was never written is NaN, so that nothing can find it unseen.
        self.keys = torch.full(shape, torch.nan, dtype=dtype)
        self.num_appended = [0] * shape[0]
        self.entries: list[deque[tuple[int, Tensor]]] = [
            deque(maxlen=shape[2]) for _ in range(shape[0])
        ]
        self.index: KeyIndex = make_index(parse_index(index))

    @property
    def stored(self) -> StoredKeys:
        return StoredKeys(self.keys, tuple(self.num_appended))

    def append(self, keys: Tensor, rows: Sequence[int] | None = None) -> None:
        """Write keys (B, H, n, D) into these rows, all by default, and tell the index once."""
        for row in range(len(self.num_appended)) if rows is None else rows:
            new = keys[row].transpose(0, 1).to(self.keys.dtype)
            entries = range(self.num_appended[row], self.num_appended[row] + len(new))
            kept = entries[-self.keys.shape[2] :]
            slots = torch.tensor(kept, dtype=torch.int64) % self.keys.shape[2]
            self.keys[row][:, slots] = new[len(new) - len(kept) :].transpose(0, 1)
            self.entries[row].extend(zip(entries, new.unbind(), strict=True))
            self.num_appended[row] += len(new)
        self.index.append(self.stored)

    def reset(self, row: int) -> None:
        self.num_appended[row] = 0
        self.entries[row].clear()
        self.index.reset([row])

    def search(
        self,
        queries: Tensor,
        k: int,
        num_hidden: Tensor | None = None,
        key_rows: Sequence[int | None] | None = None,
    ) -> Neighbors:
        """Search, and compare every result with the deque."""
        found = self.index.search(queries, self.stored, k, num_hidden=num_hidden, key_rows=key_rows)
        rows, heads, num_queries, _ = queries.shape
        for result in (found.slots, found.scores, found.valid):
            assert result.shape == (rows, heads, num_queries, k)
        assert found.scores.dtype == self.keys.dtype
        assert found.slots.dtype == torch.int64
        assert found.valid.dtype == torch.bool
        assert torch.isneginf(found.scores[~found.valid]).all()
        assert (found.slots[~found.valid] == 0).all()
        assert (found.scores[..., :-1] >= found.scores[..., 1:]).all(), "best first"
        for row in range(rows):
            source = row if key_rows is None else key_rows[row]
            entries = [] if source is None else list(self.entries[source])
            hidden = torch.zeros(num_queries, dtype=torch.int64)
            if num_hidden is not None:
                hidden = num_hidden[row]
            self._compare(
                queries[row],
                Neighbors(found.slots[row], found.scores[row], found.valid[row]),
                entries,
                hidden,
            )
        return found

    def _compare(
        self,
        queries: Tensor,
        found: Neighbors,
        entries: list[tuple[int, Tensor]],
        num_hidden: Tensor,
    ) -> None:
        """One row: as many as there are, each once, visible, with its true score."""
        visible = (len(entries) - num_hidden).clamp(min=0)
        num_valid = visible.clamp(max=found.slots.shape[-1])
        assert (found.valid.sum(-1) == num_valid).all()
        if not entries:
            return
        numbers = torch.tensor([entry for entry, _ in entries])
        place_of = torch.full((self.keys.shape[2],), -1)
        place_of[numbers % self.keys.shape[2]] = torch.arange(len(entries))
        places = place_of[found.slots]
        valid = found.valid
        assert (places[valid] >= 0).all(), "living"
        ages = len(entries) - 1 - places
        assert ((ages >= num_hidden.view(1, -1, 1)) | ~valid).all(), "visible"
        by_age = ages.masked_fill(~valid, -1).sort(-1).values
        assert ((by_age.diff(dim=-1) > 0) | (by_age[..., :-1] < 0)).all(), "each entry once"
        keys = torch.stack([key for _, key in entries], 1).float()
        true = queries.to(self.keys.dtype).float() @ keys.transpose(1, 2)
        torch.testing.assert_close(
            found.scores[valid].float(),
            true.gather(-1, places.clamp(min=0))[valid],
            rtol=2 * torch.finfo(self.keys.dtype).eps,
            atol=1e-6,
        )

    def measure_recall(self, queries: Tensor, k: int) -> float:
        return recall_at_k(self.search(queries, k), queries, self.stored)
