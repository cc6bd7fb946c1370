"""The formulas of these attentions, token by token and head by head: slow, plain, an oracle.

Each takes queries (scaled where it says so), keys and values (n, H, D) of a whole document, and
gives what every token attends to (n, H, D). What a query sees of earlier segments has no gradient.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from attentions.compressive import Compressive
from attentions.linformer import Linformer
from memorizing.model.attention import compute_buckets
from memorizing.model.block import AttentionLayer

Pairs = list[tuple[Tensor, Tensor]]
"""Scores and values."""


def attend_by_linformer(layer: Linformer, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Q is scaled."""
    length, window = layer.block_len, layer.config.window

    def see_far(t: int, h: int) -> Pairs:
        pairs = []
        ended = (t - window + 1) // length
        for block in range(max(0, ended - layer.num_blocks), ended):
            keys, values = (
                torch.stack([part[block * length + i, h] for i in range(length)]).detach()
                for part in (k, v)
            )
            for e, f in zip(layer.project_keys[h], layer.project_values[h], strict=True):
                key, value = e @ keys, f @ values
                pairs.append((q[t, h] @ key / key.norm(), value))
        return pairs

    return _attend_all(layer, q, k, v, see_far)


def attend_by_compressive(layer: Compressive, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Q is scaled; nothing here teaches the convolutions."""

    def see_far(t: int, h: int) -> Pairs:
        ended = (t - layer.config.window + 1) // layer.rate
        groups = range(max(0, ended - layer.num_slots), ended)
        made = (compress_group(layer, k, v, group, h) for group in groups)
        return [(q[t, h] @ key.detach(), value.detach()) for key, value in made]

    return _attend_all(layer, q, k, v, see_far)


def compress_group(
    layer: Compressive, k: Tensor, v: Tensor, group: int, h: int
) -> tuple[Tensor, Tensor]:
    """Key and value of one slot."""
    first = group * layer.rate
    key = torch.stack([layer.compress_keys[h, i] * k[first + i, h] for i in range(layer.rate)]).sum(
        0
    )
    value = torch.stack(
        [layer.compress_values[h, i] * v[first + i, h] for i in range(layer.rate)]
    ).sum(0)
    return key / key.norm(), value


def reconstruct(
    layer: Compressive, q: Tensor, k: Tensor, v: Tensor, start: int, stop: int
) -> Tensor:
    """The loss of a segment of tokens start to stop of one document."""
    first = max(0, start - layer.config.window) // layer.rate
    groups = range(first, max(0, stop - layer.config.window) // layer.rate)
    q, k, v = (part.detach() for part in (q, k, v))
    errors = []
    for t in range(start, stop, layer.sample_every):
        for h in range(q.shape[1]):
            made = [compress_group(layer, k, v, group, h) for group in groups]
            places = range(groups.start * layer.rate, groups.stop * layer.rate)
            of_slots = _attend_one([(q[t, h] @ key, value) for key, value in made])
            of_tokens = _attend_one([(q[t, h] @ k[j, h], v[j, h]) for j in places])
            errors.append((of_slots - of_tokens).square().mean())
    return torch.stack(errors).mean()


def attend_by_features(
    layer: AttentionLayer, directions: Tensor, q: Tensor, k: Tensor, v: Tensor
) -> Tensor:
    """`Performer`: q is normalized and not scaled."""
    rows = []
    for t in range(len(q)):
        heads = []
        for h in range(q.shape[1]):
            estimates = [
                _estimate(layer, directions, q[t, h], k[j, h], h, live=j >= _find_start(layer, t))
                for j in range(t + 1)
            ]
            weights = torch.stack(estimates)
            values = torch.stack([_cut(layer, v, t, j)[h] for j in range(t + 1)])
            heads.append(weights @ values / weights.sum())
        rows.append(torch.stack(heads))
    return torch.stack(rows)


def attend_by_features_beyond(
    layer: AttentionLayer, directions: Tensor, q: Tensor, k: Tensor, v: Tensor
) -> Tensor:
    """`PerformerBeyond`: q is normalized and not scaled."""
    assert layer.scale is not None
    scaled = q * layer.scale.view(1, -1, 1)

    def see_far(t: int, h: int) -> Pairs:
        pairs, window = [], layer.config.window
        for j in range(t - window + 1):
            # The features of those that leave the window in the query's segment teach the scale.
            live, key = j + window >= _find_start(layer, t), k[j, h].detach()
            estimate = _estimate(layer, directions, q[t, h], key, h, live=live)
            pairs.append((estimate.log(), v[j, h].detach()))
        return pairs

    return _attend_all(layer, scaled, k, v, see_far)


def _estimate(
    layer: AttentionLayer, directions: Tensor, q: Tensor, k: Tensor, h: int, *, live: bool
) -> Tensor:
    """phi(q).phi(k), an estimate of exp(s q.k); phi(k) is fixed where it is not live."""
    assert layer.scale is not None
    root = layer.scale[h].abs().sqrt()
    features = [
        torch.exp(directions[h] @ x - x @ x / 2) / math.sqrt(directions.shape[1])
        for x in (root * q, root * k)
    ]
    return features[0] @ (features[1] if live else features[1].detach())


def _attend_all(layer: AttentionLayer, q: Tensor, k: Tensor, v: Tensor, see_far) -> Tensor:
    """The window exactly, in one softmax with what `see_far` finds for a token and a head."""
    config = layer.config
    rows = []
    for t in range(len(q)):
        heads = []
        for h in range(q.shape[1]):
            pairs = []
            for j in range(max(0, t - config.window + 1), t + 1):
                distance = torch.tensor(t - j)
                bucket = compute_buckets(distance, config.num_buckets, config.max_distance)
                score = q[t, h] @ _cut(layer, k, t, j)[h] + layer.position_bias.table[h, bucket]
                pairs.append((score, _cut(layer, v, t, j)[h]))
            far_bias = layer.get_parameter("far_bias")[h]
            pairs += [(score + far_bias, value) for score, value in see_far(t, h)]
            heads.append(_attend_one(pairs))
        rows.append(torch.stack(heads))
    return torch.stack(rows)


def _attend_one(pairs: Pairs) -> Tensor:
    scores, values = (torch.stack(part) for part in zip(*pairs, strict=True))
    return torch.softmax(scores, 0) @ values


def _cut(layer: AttentionLayer, x: Tensor, t: int, j: int) -> Tensor:
    """x_j as the query t sees it: without gradient where it is of an earlier segment."""
    return x[j] if j >= _find_start(layer, t) else x[j].detach()


def _find_start(layer: AttentionLayer, t: int) -> int:
    """The first token of the segment of t."""
    return t // layer.config.segment_len * layer.config.segment_len
