"""Which heads find passages, found out from any text: places of it are looked for from outside.

A prompt that stands in a text is read alone, as a user's prompt is. What its last queries ask for
is compared with the entries of the whole text, as `sum_chunks` does, but head by head, of a chunk c
with the one that follows it, as passages are found:

    share(h, t, c) = sum_{e in c and the next} softmax_e(s_h q_ht . k_he)
    rank = 1 + number of other chunks with no lower score than the best of the right ones

where chunks are scored by `score_chunks`, and right are those whose passage has the chunk of the
token after the prompt: it begins a chunk earlier, and ends two later.
Of each layer those heads are taken that have the largest mean of 1 / rank together, and then the
layers that have it, of those that are about as good the lowest: as far up goes what is read, and
what is asked. In every second prompt some tokens are exchanged, as where names differ, so
that heads that find nothing but copies are not preferred.

Source: heads that retrieve are few in every model (Wu et al. 2024), and their attention is a good
retriever (QRRetriever, 2025). **Deviation:** those score heads by questions with known answers;
here the text itself has the places, so that no labels are needed.

Shapes: P prompts of M tokens, T last queries of each, L layers, H heads of queries, K heads of
keys, n entries, C chunks, D head_dim.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from memorizing.huggingface.attaching.attachment import Attachment
from memorizing.huggingface.attaching.passages import Collection, score_chunks
from memorizing.huggingface.sessions.reading import read_tokens
from memorizing.huggingface.sessions.scoring import Progress, read_memory
from memorizing.memory.frozen import FrozenMemory

PROMPT_LEN = 48
"""Tokens of a prompt."""
NUM_PLACES = 64
"""Looked for; their share is known to 2% where it is 97%."""
LEAST_CHUNKS = 64
"""Of a text: among fewer, many are found by chance."""
MAX_HEADS = 3
"""Of a layer."""
LEAST_GAIN = 0.01
"""Of the mean of 1 / rank, that one more head or layer must bring; layers that are by less behind
the best are about as good."""
_RENAMED = 0.15
"""Share of the different tokens of a prompt that are exchanged."""
_ROWS = 8
"""Prompts that are read side by side."""
_AMONG = 4
_NUM_EARLIER, _NUM_LATER = 2, 1
"""How many chunks before a place, and behind it, have a passage around them that holds the place:
one of the default length."""


@dataclass(frozen=True)
class Ranks:
    """How places of a text were found."""

    ranks: Tensor
    """(P,) int64, of `rank_places`."""

    @property
    def first(self) -> float:
        """Share of places that came first."""
        return float((self.ranks == 1).float().mean())

    @property
    def among_four(self) -> float:
        """Share of places that were among the best four."""
        return float((self.ranks <= _AMONG).float().mean())

    def __str__(self) -> str:
        """On a line."""
        return (
            f"of {len(self.ranks)} places of this text, {self.first:.0%} came first and "
            f"{self.among_four:.0%} among the best {_AMONG}"
        )


@dataclass(frozen=True)
class Places:
    """Places of a text, and prompts that ask for them."""

    prompts: Tensor
    """(P, M) int64."""
    after: Tensor
    """(P,) int64: the token of the text that comes after each prompt."""


@dataclass(frozen=True)
class Finders:
    """Heads that find."""

    heads: dict[int, tuple[int, ...]]
    """Per layer."""
    ranks: Ranks
    """Of the places, with these heads."""
    single: Tensor
    """(L, H): mean of 1 / rank with one head alone."""


def draw_places(
    tokens: Tensor, first: int, start_token: int | None = None, num_places: int = NUM_PLACES
) -> Places:
    """Places spread over a text, the same ones always, and a prompt for each.

    Args:
        tokens: (n,) int64 of the text, more than `PROMPT_LEN` from `first` on.
        first: no prompt begins before it.
        start_token: of the model. Where the text begins with it, prompts do.
        num_places: P, or all where the text has fewer.
    """
    generator = torch.Generator().manual_seed(0)
    num_starts = len(tokens) - PROMPT_LEN - first
    starts = torch.randperm(num_starts, generator=generator)[:num_places].sort().values + first
    prompts = tokens[starts.unsqueeze(1) + torch.arange(PROMPT_LEN)]
    for prompt in prompts[1::2]:
        _rename(prompt, tokens, generator)
    if start_token is not None and tokens[0] == start_token:
        prompts = torch.cat([tokens[:1].expand(len(prompts), 1), prompts], 1)
    return Places(prompts, starts + PROMPT_LEN)


def _rename(prompt: Tensor, tokens: Tensor, generator: torch.Generator) -> None:
    """Exchange some of the different tokens of a prompt for others of the text. In place."""
    kinds, before = prompt.unique(), prompt.clone()
    count = max(1, round(_RENAMED * len(kinds)))
    for kind in kinds[torch.randperm(len(kinds), generator=generator)[:count]]:
        other = int(torch.randint(len(tokens), (), generator=generator))
        prompt[before == kind] = tokens[other]


def find_finders(
    attachment: Attachment,
    tokens: Tensor,
    places: Places,
    max_layers: int,
    progress: Progress | None = None,
) -> Finders:
    """The heads that find places of a text best; see `measure_shares`.

    Args:
        attachment: of the model, with all heads open. Not changed.
        tokens: (n,) int64 of the text.
        places: of it.
        max_layers: most layers.
        progress: called with the tokens read so far, and those of all; not of sinks.
    """
    heads, found, single = [], [], []
    for shares, right in measure_shares(attachment, tokens, places, progress):
        heads.append(choose(shares.unbind(1), right, MAX_HEADS))
        found.append(shares[:, heads[-1]].mean(1))
        single.append(_rate(shares, right))
    chosen = choose(found, right, max_layers, LEAST_GAIN)
    shares = torch.stack([found[place] for place in chosen]).mean(0)
    return Finders(
        {attachment.settings.layers[place]: tuple(heads[place]) for place in chosen},
        Ranks(rank_places(score_chunks(shares), right)),
        torch.stack(single),
    )


def measure_shares(
    attachment: Attachment, tokens: Tensor, places: Places, progress: Progress | None = None
) -> Iterator[tuple[Tensor, Tensor]]:
    """Per layer, what `weigh_by_head` gives all chunks, (P, H, T, C), and the right chunks (P,).

    The text is read once, as `MemorySession.read` reads it, and every prompt alone. See
    `find_finders`.
    """
    settings, done = attachment.settings, 0
    total = len(tokens) - settings.num_sinks + places.prompts.numel()

    def tell(num_tokens: int) -> None:
        nonlocal done
        done += num_tokens
        if progress is not None:
            progress(done, total)

    pieces = []
    for piece in read_tokens(attachment, tokens):
        pieces.append(piece)
        tell(next(iter(piece.values()))[0].shape[1])
    asked = []
    model = attachment.model()
    device, was_training = model.get_input_embeddings().weight.device, model.training
    model.eval()
    try:
        with read_memory(attachment, 0):
            for rows in places.prompts.split(_ROWS):
                cache = attachment.pass_cache(attachment.make_cache())
                asked.append(attachment.ask(input_ids=rows.to(device), **cache))
                tell(rows.numel())
    finally:
        model.train(was_training)
    for layer in settings.layers:
        held = [piece.pop(layer) for piece in pieces]
        keys, values = (torch.cat(parts, 1) for parts in zip(*held, strict=True))
        entries = FrozenMemory.from_tensors(keys, values)
        collection = Collection((keys.shape[1],), {layer: entries})
        queries = torch.cat([queries.pop(layer) for queries in asked])
        right = collection.find_chunks(places.after - settings.num_sinks)
        yield weigh_by_head(queries, keys, collection), right


def weigh_by_head(queries: Tensor, keys: Tensor, collection: Collection) -> Tensor:
    """Shares of attention (P, H, T, C) fp32 of every head: those of `share_out`, joined likewise.

    Args:
        queries: (P, H, T, D), multiplied by the scale of the layer.
        keys: (K, n, D).
        collection: of the entries of these keys alone.
    """
    keys, hidden = keys.to(queries.device, torch.float32), collection.is_sink.to(queries.device)
    chunks = collection.find_chunks(torch.arange(keys.shape[1])).to(queries.device)
    found = []
    for asked in queries:
        by_head = asked.float().unflatten(0, (len(keys), -1)).flatten(1, 2)
        scores = torch.matmul(by_head, keys.transpose(1, 2)).view(*asked.shape[:2], -1)
        weights = scores.masked_fill(hidden, -torch.inf).softmax(-1)
        sums = weights.new_zeros(*asked.shape[:2], len(collection.first_of_chunk))
        found.append(collection.join_next(sums.index_add_(2, chunks, weights).cpu()))
    return torch.stack(found)


def rank_places(scores: Tensor, right: Tensor) -> Tensor:
    """How far in front stand those that lead to the right chunks: (P, ...) int64, 1 is first.

    What has the same score stands before them.

    Args:
        scores: (P, ..., C).
        right: (P,) int64.
    """
    distance = torch.arange(scores.shape[-1]) - right.unsqueeze(1)
    is_other = (distance < -_NUM_EARLIER) | (distance > _NUM_LATER)
    is_other = is_other.view(len(right), *[1] * (scores.dim() - 2), -1)
    best = scores.masked_fill(is_other, -torch.inf).amax(-1, keepdim=True)
    return 1 + ((scores >= best) & is_other).sum(-1)


def choose(shares: Sequence[Tensor], right: Tensor, most: int, slack: float = 0.0) -> list[int]:
    """Which heads, or layers, find best together: the best one, and others while they bring more.

    Args:
        shares: (P, T, C) of each; together they count by their mean.
        right: (P,) int64.
        most: of them.
        slack: of those whose mean of 1 / rank is at most so far below the best, the first is taken.
    """
    chosen: list[int] = []
    total, best = torch.zeros_like(shares[0]), 0.0
    while len(chosen) < min(most, len(shares)):
        found = {
            number: float(_rate((total + share) / (len(chosen) + 1), right))
            for number, share in enumerate(shares)
            if number not in chosen
        }
        most_found, enough = max(found.values()), best + LEAST_GAIN if chosen else 0.0
        if most_found < enough:
            break
        least = max(most_found - slack, enough)
        number = next(number for number, rate in found.items() if rate >= least)
        chosen.append(number)
        total, best = total + shares[number], found[number]
    return sorted(chosen)


def _rate(shares: Tensor, right: Tensor) -> Tensor:
    """Mean of 1 / rank (...) by shares (P, ..., T, C)."""
    return (1.0 / rank_places(score_chunks(shares), right)).mean(0)
