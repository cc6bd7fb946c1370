"""Which layers and heads of a model can use a memory, found out from the model itself.

Shapes: L candidate layers, H heads of queries.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from memorizing.errors import ConfigError
from memorizing.huggingface.attaching.attachment import (
    Attachment,
    add_memory,
    get_attachment,
    remove_memory,
)
from memorizing.huggingface.attaching.families import find_layers
from memorizing.huggingface.attaching.memory_settings import MemorySettings
from memorizing.huggingface.sessions.scoring import Progress, read_memory, score_texts
from memorizing.huggingface.sessions.texts import encode_text
from memorizing.settings import require

_NUM_WINDOWS = 8
"""Read of texts for a memory that is calibrated on them."""
_NOT_READ = ("capacity", "dtype", "index")
"""Settings that say how entries are kept, not how they are read."""
LEAST_GAIN = 0.003
"""Nats per token that a head must promise by itself."""
_NUM_ERRORS = 1.0
"""Standard errors, over segments, by which a head's promise must differ from 0."""


@dataclass(frozen=True)
class Calibration:
    """What was found."""

    heads: dict[int, tuple[int, ...]]
    """Per layer, heads that shall read the memory: `add_memory(model, heads=..., bias=...)`."""
    bias: float
    """Where their gates start."""
    candidates: tuple[int, ...]
    """Layers that could be chosen."""
    slopes: Tensor
    """(candidates, H): change of nats per token with the strength of a head, at strength 0."""
    nats_without: float
    """Nats per token of the text, from the first segment that has something to retrieve."""
    nats_with: float
    """The same with these heads and this bias."""
    settings: dict[str, Any]
    """What else it was calibrated with."""

    def __str__(self) -> str:
        """What was found, on a line."""
        chosen = "; ".join(
            f"layer {layer}, heads {', '.join(map(str, heads))}"
            for layer, heads in self.heads.items()
        )
        return (
            f"{chosen}; bias {self.bias:g}; {self.nats_with:.3f} nats per token with a memory of "
            f"this text, {self.nats_without:.3f} without"
        )

    def add_to(self, model: Any, **settings: Any) -> Any:
        """`add_memory` as calibrated; `settings` replace or add to it. In place."""
        chosen = {**self.settings, "heads": self.heads, "bias": self.bias, **settings}
        return add_memory(model, **chosen)


@torch.inference_mode(False)
def calibrate(
    model: Any,
    tokens: Sequence[int] | Tensor,
    *,
    max_layers: int = 4,
    candidates: Sequence[int] | None = None,
    biases: Sequence[float] = (0.0, 1.0, 2.0),
    window: int = 512,
    progress: Progress | None = None,
    **settings: Any,
) -> Calibration:
    """Find the layers and heads of a model that gain most by a memory.

    The text is read once with a memory in every layer whose strength s is 0:
    V = V_c + s (V_mixed - V_c), so that nothing is changed; one backward pass per segment gives the
    change of the loss with the strength of every head, dL/ds. Heads that promise a gain in this way
    are tried together with a few biases, on the same text. Nothing is trained. It takes about as
    long as reading the text ten times.

    Args:
        model: without a memory. As it was afterwards.
        tokens: (n,) of one text, of the kind that the memory shall be used for; a few thousand,
            at least four windows.
        max_layers: how many layers may be chosen. Each costs time at every token.
        candidates: layers that may be chosen; None is the upper two thirds: what lower layers have
            of a text is not worth retrieving, as far as was tried.
        biases: tried for the chosen heads.
        window: tokens that local attention sees.
        progress: called after every segment with the tokens read so far, and those of all readings.
        settings: as in `add_memory`.

    Raises:
        ConfigError: the text is too short, the model has a memory, or was loaded where no gradient
            can be had, or no head gains by one.
    """
    ids = torch.as_tensor(tokens, dtype=torch.int64).flatten()
    require(
        len(ids) > 4 * window,
        "tokens",
        len(ids),
        f"more than {4 * window}: four windows, of which the last two have something to retrieve",
    )
    require(max_layers >= 1, "max_layers", max_layers, "1 or more")
    way = settings.get("read", "entries")
    require(way == "entries", "read", way, "entries: what heads gain by passages is not measured")
    require(
        not any(parameter.is_inference() for parameter in model.parameters()),
        "model",
        "loaded inside of torch.inference_mode()",
        "one that was loaded outside, which gradients can be computed of",
    )
    common = {"window": window, "capacity": len(ids), "dtype": "float32", **settings}
    num_layers = len(find_layers(model)[2])
    # Slopes come in the order of the layers, whatever the order they are named in.
    candidates = sorted(range(num_layers // 3, num_layers) if candidates is None else candidates)
    add_memory(model, candidates, **common)
    try:
        nats, slopes = measure_slopes(get_attachment(model), ids, _pass_on(progress, 0, biases))
    finally:
        remove_memory(model)
    segment_len = int(settings.get("segment_len") or window)
    first = -(-window // segment_len) + 1
    heads = {
        candidates[place]: heads
        for place, heads in choose_heads(slopes[first:], max_layers).items()
    }
    without = float(nats[first:].mean())
    if not heads:
        raise ConfigError(
            "no head of this model gains by a memory on this text; give a longer text that repeats "
            "names or phrases, or choose layers by hand and finetune"
        )
    found: dict[float, float] = {}
    for number, bias in enumerate(biases, 1):
        add_memory(model, heads=heads, bias=bias, **common)
        try:
            tick = _pass_on(progress, number, biases)
            found[bias] = float(measure_nats(get_attachment(model), ids, tick)[first:].mean())
        finally:
            remove_memory(model)
    best = min(found, key=lambda bias: found[bias])
    if found[best] >= without:
        raise ConfigError(
            f"a memory does not help this model on this text: {found[best]:.4f} nats per token "
            f"with it, {without:.4f} without; give a longer text, or finetune"
        )
    kept = {"window": window, **settings}
    return Calibration(
        heads, best, tuple(candidates), slopes[first:].mean(0), without, found[best], kept
    )


def add_calibrated_memory(
    model: Any,
    tokenizer: Any,
    texts: Iterable[str],
    *,
    progress: Progress | None = None,
    **settings: Any,
) -> Calibration:
    """Give a model a memory in the layers and heads that gain on the beginning of texts. In place.

    Args:
        model: without a memory.
        tokenizer: of the model.
        texts: read as one, up to eight windows.
        progress: see `calibrate`.
        settings: as in `add_memory`, without layers and heads.

    Raises:
        ConfigError: there are too few tokens, or no head gains.
    """
    num_tokens = _NUM_WINDOWS * settings.get("window", MemorySettings.window) + 1
    tokens: list[int] = []
    for text in texts:
        tokens += encode_text(tokenizer, text, is_whole=True).tolist()
        if len(tokens) >= num_tokens:
            break
    read = {name: value for name, value in settings.items() if name not in _NOT_READ}
    found = calibrate(model, tokens[:num_tokens], progress=progress, **read)
    found.add_to(model, **settings)
    return found


def _pass_on(progress: Progress | None, number: int, biases: Sequence[float]) -> Progress | None:
    """Tell of one reading of several: that of slopes, then one with each bias."""
    if progress is None:
        return None
    return lambda done, total: progress(number * total + done, (1 + len(biases)) * total)


def choose_heads(slopes: Tensor, max_layers: int) -> dict[int, tuple[int, ...]]:
    """The heads of the layers that promise most.

    Args:
        slopes: (segments, L, H); negative is a gain.
        max_layers: most layers.
    """
    mean = slopes.mean(0)
    error = slopes.std(0, correction=1) / len(slopes) ** 0.5 if len(slopes) > 1 else mean.abs() * 0
    gains = (-mean).where((-mean > LEAST_GAIN) & (-mean > _NUM_ERRORS * error), 0.0)
    per_layer = gains.sum(1)
    layers = [
        layer for layer in per_layer.argsort(descending=True).tolist() if per_layer[layer] > 0
    ]
    return {
        layer: tuple(gains[layer].nonzero().flatten().tolist())
        for layer in sorted(layers[:max_layers])
    }


def measure_slopes(
    attachment: Attachment, tokens: Tensor, progress: Progress | None = None
) -> tuple[Tensor, Tensor]:
    """Nats per token of each whole segment, and dL/ds per token of each (segments, L, H)."""
    model = attachment.model()
    parameters = [p for p in model.parameters() if p.requires_grad]
    strengths = {
        number: torch.zeros_like(layer.bias, requires_grad=True)
        for number, layer in attachment.layers.items()
    }
    device = model.get_input_embeddings().weight.device
    inputs, targets = _cut(tokens.to(device), attachment.settings.segment_len)
    was_training = model.training
    model.eval().requires_grad_(False)
    nats, slopes = [], []
    try:
        with read_memory(attachment), attachment.change_mode(strengths=strengths):
            cache = attachment.make_cache()
            for number, (piece, target) in enumerate(zip(inputs, targets, strict=True)):
                with torch.enable_grad():
                    logits = model(piece.unsqueeze(0), **attachment.pass_cache(cache)).logits[0]
                    loss = cross_entropy(logits.float(), target)
                    # The first segment has nothing to retrieve, and a loss without a graph.
                    found = (
                        torch.autograd.grad(loss, list(strengths.values()), materialize_grads=True)
                        if loss.requires_grad
                        else [torch.zeros_like(strength) for strength in strengths.values()]
                    )
                attachment.commit(cache)
                nats.append(float(loss.detach()))
                slopes.append(torch.stack([slope.float().cpu() for slope in found]))
                if progress is not None:
                    progress((number + 1) * len(target), targets.numel())
    finally:
        model.train(was_training)
        for parameter in parameters:
            parameter.requires_grad_(True)
    return torch.tensor(nats), torch.stack(slopes)


def measure_nats(
    attachment: Attachment, tokens: Tensor, progress: Progress | None = None
) -> Tensor:
    """Nats per token of each whole segment, with what the model remembers of the text itself."""
    _, targets = _cut(tokens, attachment.settings.segment_len)
    text = targets.flatten().numpy()
    (nats,) = score_texts(attachment.model(), [text], int(tokens[0]), progress=progress)
    return torch.from_numpy(nats).view(targets.shape).mean(1)


def _cut(tokens: Tensor, segment_len: int) -> tuple[Tensor, Tensor]:
    """Whole segments (n, segment_len), and the tokens that follow each of theirs."""
    end = (len(tokens) - 1) // segment_len * segment_len
    return tokens[:end].view(-1, segment_len), tokens[1 : end + 1].view(-1, segment_len)
