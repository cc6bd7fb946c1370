"""What a model made of a text, token by token, with its memory and with less of it.

Shapes: n tokens of the text, P heads that read the memory, k neighbors, m of them kept.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from memorizing.evaluation import Progress, evaluate_documents
from memorizing.model import MemorizingTransformer, ModelOutput

if TYPE_CHECKING:
    from memorizing.data import TokenizedDocument
    from memorizing.huggingface.attaching.attachment import Attachment
    from memorizing.huggingface.attaching.passage_room import Passage
    from memorizing.huggingface.attaching.step import Finding

KEPT = 8
"""Entries that are kept per token and head: the heaviest."""
NUM_AGES = 10
"""Equal parts of what could be retrieved, from the newest to the oldest."""
DISTANCE_EDGES = (256, 512, 1024, 2048, 4096, 8192, 16_384, 32_768, 65_536)
"""Tokens; where the classes of a distance end."""


@dataclass(frozen=True)
class Sight:
    """Passages that the tokens from one on had in sight, until the next."""

    first: int
    """Token of the text."""
    passages: tuple[Passage, ...]
    """Best one first."""


@dataclass(frozen=True)
class Trace:
    """How every token of a text was predicted.

    A *place* is a token of the text: what came next after the entry, which holds the token before
    it. From `num_tokens + 1` on it is the number of an entry of the open memory.
    """

    nats: NDArray[np.float32]
    """(n,) with the memory."""
    heads: tuple[tuple[int, int], ...] = ()
    """Layer and head of the P heads."""
    places: NDArray[np.int64] = field(default_factory=lambda: np.zeros((0, 0, 0), np.int64))
    """(n, P, m): the heaviest first; -1 where nothing more was found."""
    weights: NDArray[np.float32] = field(default_factory=lambda: np.zeros((0, 0, 0), np.float32))
    """(n, P, m): shares of the head's attention to all that it retrieved."""
    scores: NDArray[np.float32] = field(default_factory=lambda: np.zeros((0, 0, 0), np.float32))
    """(n, P, m): by which it was found, larger is nearer."""
    gates: NDArray[np.float32] = field(default_factory=lambda: np.zeros((0, 0), np.float32))
    """(n, P): how much of what the head says comes from the memory: g of its output, or of the
    prediction the share s that it points with, together 1 - (1 - g)(1 - s)."""
    by_distance: NDArray[np.float64] = field(default_factory=lambda: np.zeros((0, 0)))
    """(P, distances): weight, times gate, of all that was retrieved of the text itself."""
    by_age: NDArray[np.float64] = field(default_factory=lambda: np.zeros((0, NUM_AGES)))
    """(P, ages): the same by where in the text read so far it stands, the newest tenth first."""
    sights: tuple[Sight, ...] = ()

    @property
    def num_tokens(self) -> int:
        """N."""
        return len(self.nats)

    def is_own(self, places: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Which places are tokens of the text itself."""
        return (places >= 0) & (places <= self.num_tokens)

    def list_weights(self, token: int) -> list[tuple[int, float]]:
        """Places that the heads retrieved for a token, with gate x weight / P of each."""
        weights = self.weights[token] * self.gates[token][:, None] / len(self.heads or [0])
        pairs = zip(self.places[token].flatten().tolist(), weights.flatten().tolist(), strict=True)
        return [(place, weight) for place, weight in pairs if place >= 0]

    def pool(self) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """(n,) for every token the place that all heads together weighed most, and its weight.

        The weight is the mean over heads of gate x weight; -1 and 0 where nothing was retrieved.
        """
        n = self.num_tokens
        if not self.places.size:
            return np.full(n, -1, np.int64), np.zeros(n, np.float32)
        places = self.places.reshape(n, -1)
        weights = (self.weights * self.gates[:, :, None]).reshape(n, -1) / len(self.heads)
        order = np.argsort(places, axis=1, kind="stable")
        places, weights = (np.take_along_axis(part, order, 1) for part in (places, weights))
        # Sums of runs of equal places, at the last of each run.
        sums = weights.cumsum(1, dtype=np.float64)
        last = np.ones_like(places, dtype=bool)
        last[:, :-1] = places[:, 1:] != places[:, :-1]
        before = np.maximum.accumulate(np.where(last, sums, 0.0), axis=1)
        before = np.concatenate([np.zeros((n, 1)), before[:, :-1]], 1)
        totals = np.where(last & (places >= 0), sums - before, -1.0)
        best = totals.argmax(1)[:, None]
        place = np.take_along_axis(places, best, 1)[:, 0]
        weight = np.take_along_axis(totals, best, 1)[:, 0].clip(min=0).astype(np.float32)
        return np.where(weight > 0, place, -1), weight


class Recorder:
    """Takes what was retrieved, call after call, and makes a `Trace` of it."""

    def __init__(self, num_tokens: int, kept: int) -> None:
        """Of a text of so many tokens."""
        self.num_tokens, self.kept = num_tokens, kept
        self.heads: dict[int, list[int]] = {}
        self._parts: dict[int, list[tuple[NDArray[Any], ...]]] = {}
        self._sums: dict[int, tuple[NDArray[np.float64], NDArray[np.float64]]] = {}
        self._sights: dict[int, list[Passage]] = {}

    def add(
        self,
        layer: int,
        first: int,
        places: Tensor,
        weights: Tensor,
        scores: Tensor,
        gates: Tensor,
        heads: Sequence[int],
    ) -> None:
        """Take what one layer retrieved for tokens from `first` on.

        Args:
            layer: its number.
            first: token of the text.
            places: (P, T, k); -1 where nothing was found.
            weights: (P, T, k).
            scores: (P, T, k).
            gates: (P, T).
            heads: P numbers.
        """
        weights = weights.float().masked_fill(places < 0, 0.0)
        self.heads[layer] = list(heads)
        kept = weights.topk(min(self.kept, weights.shape[-1]), dim=-1)
        parts = (
            places.gather(-1, kept.indices),
            kept.values,
            scores.float().masked_fill(places < 0, 0.0).gather(-1, kept.indices),
            gates.float().unsqueeze(-1),
        )
        arrays = tuple(part.transpose(0, 1).cpu().numpy() for part in parts)
        self._parts.setdefault(layer, []).append((np.array(first), *arrays))
        self._count(layer, first, places.cpu(), (weights * gates.unsqueeze(-1)).cpu())

    def _count(self, layer: int, first: int, places: Tensor, weights: Tensor) -> None:
        num_heads, num_tokens = places.shape[:2]
        now = torch.arange(first, first + num_tokens).view(-1, 1)
        own = (places >= 0) & (places <= self.num_tokens)
        weights = weights.masked_fill(~own, 0.0).double()
        distance = torch.bucketize(now - places, torch.tensor(DISTANCE_EDGES), right=True)
        age = ((now - places) * NUM_AGES // (now + 1)).clamp(0, NUM_AGES - 1)
        sizes = (len(DISTANCE_EDGES) + 1, NUM_AGES)
        sums = self._sums.setdefault(layer, tuple(np.zeros((num_heads, n)) for n in sizes))  # type: ignore[arg-type]
        for total, of, size in zip(sums, (distance, age), sizes, strict=True):
            of = of.clamp(0, size - 1).masked_fill(~own, 0)
            found = torch.zeros(num_heads, size, dtype=torch.float64)
            total += found.scatter_add_(1, of.flatten(1), weights.flatten(1)).numpy()

    def add_passage(self, first: int, passage: Passage) -> None:
        """Take a passage that the tokens from `first` on have in sight."""
        self._sights.setdefault(first, []).append(passage)

    def finish(self, nats: NDArray[np.float32]) -> Trace:
        """The trace of the text."""
        sights = tuple(Sight(first, tuple(found)) for first, found in self._sights.items())
        if not self._parts:
            return Trace(nats, sights=sights)
        layers = sorted(self._parts)
        n = self.num_tokens
        columns: list[list[NDArray[Any]]] = [[], [], [], []]
        for layer in layers:
            shape = (n, len(self.heads[layer]), self.kept)
            whole = [
                np.full(shape, -1, np.int64),
                np.zeros(shape, np.float32),
                np.zeros(shape, np.float32),
                np.zeros((*shape[:2], 1), np.float32),
            ]
            for first, *parts in self._parts[layer]:
                for target, part in zip(whole, parts, strict=True):
                    target[first : first + len(part), :, : part.shape[-1]] = part
            for column, target in zip(columns, whole, strict=True):
                column.append(target)
        places, weights, scores, gates = (np.concatenate(column, 1) for column in columns)
        by_distance, by_age = (
            np.concatenate([self._sums[layer][i] for layer in layers]) for i in range(2)
        )
        heads = tuple((layer, head) for layer in layers for head in self.heads[layer])
        return Trace(
            nats, heads, places, weights, scores, gates[..., 0], by_distance, by_age, sights
        )


def trace_document(
    model: MemorizingTransformer,
    document: TokenizedDocument,
    start_token: int,
    capacity: int,
    *,
    max_tokens: int = 0,
    kept: int = KEPT,
    progress: Progress | None = None,
) -> Trace:
    """Read a document with a model of ours, as `evaluate_documents` does, and keep what it found.

    Args:
        model: with or without memory layers.
        document: the text.
        start_token: precedes it.
        capacity: entries of the memory; 0 turns it off.
        max_tokens: only the first tokens are read; 0 reads all.
        kept: entries kept per token and head.
        progress: called after every segment.

    Raises:
        ConfigError: as `evaluate_documents`.
    """
    num_tokens = min(len(document.tokens), max_tokens or len(document.tokens))
    recorder, done = Recorder(num_tokens, kept), 0
    gates = model.gates()

    def on_output(output: ModelOutput) -> None:
        nonlocal done
        for layer, found in (output.retrievals or {}).items():
            places = found.positions[0].masked_fill(~found.valid[0], -1)
            is_found = found.valid[0].any(-1)
            gate = gates[layer].view(-1, 1) if layer in gates else torch.ones(1)
            if found.shares is not None:
                gate = 1 - (1 - gate) * (1 - found.shares[0].to(gate.dtype))
            recorder.add(
                layer,
                done,
                places,
                found.weights[0],
                found.scores[0],
                gate * is_found.float(),
                range(len(places)),
            )
        done += output.logits.shape[1]

    result = evaluate_documents(
        model,
        [document],
        start_token,
        capacity=capacity,
        rows=1,
        max_tokens=max_tokens,
        on_output=on_output,
        progress=progress,
    )
    return recorder.finish(result.documents[0].token_nats)


@contextmanager
def record_retrieval(
    attachment: Attachment, num_tokens: int, kept: int = KEPT
) -> Iterator[tuple[Recorder, Progress]]:
    """Record what a model of `transformers` retrieves for the one text that is scored inside.

    Args:
        attachment: of the model.
        num_tokens: of the text.
        kept: entries kept per token and head.

    Yields:
        The recorder, and what must be called after every segment.
    """
    recorder, begun = Recorder(num_tokens, kept), 0
    done: dict[int, int] = {}

    def on_retrieved(layer: int, findings: Sequence[Finding], gates: Tensor) -> None:
        passages = [one.passage for one in findings if one.passage is not None]
        for passage in passages:
            recorder.add_passage(begun, passage)
        if passages:
            return
        places = []
        for one in findings:
            found = one.entries if one.is_own else one.entries + num_tokens + 1
            places.append(found.masked_fill(one.scores == -torch.inf, -1)[0])
        parts = (
            torch.cat([one.shares[0] for one in findings], -1),
            torch.cat([one.scores[0] for one in findings], -1),
        )
        heads = attachment.open_heads[layer].heads
        numbers = range(gates.shape[1]) if heads is None else heads.tolist()
        first = done.get(layer, 0)
        recorder.add(layer, first, torch.cat(places, -1), *parts, gates[0], numbers)
        done[layer] = first + gates.shape[-1]

    def progress(num_done: int, total: int) -> None:
        nonlocal begun
        begun = num_done
        # A segment without anything to retrieve is not told of.
        for layer in attachment.settings.layers:
            done[layer] = num_done

    with attachment.listen(on_retrieved):
        yield recorder, progress
