"""Which layers and heads of a model can use a memory, found out from the model itself.

Shapes: L candidate layers, H heads of queries.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, overload

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from memorizing.errors import ConfigError
from memorizing.huggingface.attaching.attachment import (
    Attachment,
    add_memory,
    describe_heads,
    get_attachment,
    remove_memory,
)
from memorizing.huggingface.attaching.families import find_layers
from memorizing.huggingface.attaching.memory_settings import MemorySettings
from memorizing.huggingface.attaching.passage_room import look_up_start_token
from memorizing.huggingface.attaching.passages import CHUNK_LEN
from memorizing.huggingface.learning.finding_heads import (
    LEAST_CHUNKS,
    Ranks,
    draw_places,
    find_finders,
)
from memorizing.huggingface.sessions.scoring import Progress, read_memory, score_texts
from memorizing.huggingface.sessions.texts import encode_text
from memorizing.settings import require

_NUM_WINDOWS = 8
"""Read of texts for a memory that is calibrated on them."""
_NUM_TOKENS = 8192
"""The same for passages."""
_NOT_READ = ("capacity", "dtype", "index")
"""Settings that say how entries are kept, not how they are read."""
LEAST_GAIN = 0.003
"""Nats per token that a head must promise by itself."""
LEAST_FOUND = 0.5
"""Share of places that must be among the best four passages."""
_NUM_ERRORS = 1.0
"""Standard errors, over segments, by which a head's promise must differ from 0."""


@dataclass(frozen=True)
class Calibration:
    """What was found: an `EntryCalibration` or a `PassageCalibration`."""

    heads: dict[int, tuple[int, ...]]
    """Per layer, heads that shall read the memory: `add_memory(model, heads=...)`."""
    candidates: tuple[int, ...]
    """Layers that could be chosen."""
    settings: dict[str, Any]
    """What else `add_memory` is given."""

    def __str__(self) -> str:
        """What was found, on a line."""
        return describe_heads(self.heads)

    def add_to(self, model: Any, **settings: Any) -> Any:
        """`add_memory` as calibrated; `settings` replace or add to it. In place."""
        return add_memory(model, **{**self.settings, "heads": self.heads, **settings})


@dataclass(frozen=True)
class EntryCalibration(Calibration):
    """Heads that gain by entries."""

    slopes: Tensor
    """(candidates, H): change of nats per token with the strength of a head, at strength 0."""
    nats_without: float
    """Nats per token of the text, from the first segment that has something to retrieve."""
    nats_with: float
    """The same with these heads, and gates that start at the `bias` of `settings`."""

    def __str__(self) -> str:
        """What was found, on a line."""
        return (
            f"{super().__str__()}; bias {self.settings['bias']:g}; {self.nats_with:.3f} nats per "
            f"token with a memory of this text, {self.nats_without:.3f} without"
        )


@dataclass(frozen=True)
class PassageCalibration(Calibration):
    """Heads that find passages."""

    single: Tensor
    """(candidates, H): the mean of 1 / rank with one head alone."""
    ranks: Ranks
    """Of the right places, with these heads."""

    def __str__(self) -> str:
        """What was found, on a line."""
        return f"{super().__str__()}; {self.ranks}"


@overload
def calibrate(
    model: Any, tokens: Sequence[int] | Tensor, *, read: Literal["entries"], **settings: Any
) -> EntryCalibration: ...
@overload
def calibrate(
    model: Any, tokens: Sequence[int] | Tensor, *, read: Literal["passages"] = ..., **settings: Any
) -> PassageCalibration: ...
def calibrate(
    model: Any,
    tokens: Sequence[int] | Tensor,
    *,
    read: Literal["passages", "entries"] = "passages",
    max_layers: int | None = None,
    candidates: Sequence[int] | None = None,
    biases: Sequence[float] | None = None,
    window: int = MemorySettings.window,
    progress: Progress | None = None,
    **settings: Any,
) -> Calibration:
    """Find the layers and heads of a model that make most of a memory. Nothing is trained.

    Where entries are read, the text is read once with a memory in every layer whose strength s is
    0: V = V_c + s (V_mixed - V_c), so that nothing is changed; one backward pass per segment gives
    the change of the loss with the strength of every head, dL/ds. Heads that promise a gain in this
    way are tried together with a few biases, on the same text. It takes about as long as reading
    the text ten times.

    Where passages are read, places of the text are looked for, and the heads are chosen that find
    them best; see `finding_heads.py`. It takes about as long as reading the text once or twice.

    Args:
        model: without a memory. As it was afterwards.
        tokens: (n,) of one text, of the kind that the memory shall be used for; a few thousand:
            more than four windows, or for passages 2,048 besides the sinks.
        read: as in `MemorySettings`.
        max_layers: how many layers may be chosen; each costs time at every token. None is 4, for
            passages 1.
        candidates: layers that may be chosen. None is the upper two thirds (what lower layers have
            of a text is not worth retrieving, as far as was tried), for passages all.
        biases: tried for the chosen heads, not for passages; None is 0, 1 and 2.
        window: tokens that local attention sees.
        progress: called after every segment with the tokens read so far, and those of all readings.
        settings: as in `add_memory`.

    Raises:
        ConfigError: the text is too short, the model has a memory, or was loaded where no gradient
            can be had, or no head gains by one, or finds passages.
    """
    require(read in _MAX_LAYERS, "read", read, " or ".join(_MAX_LAYERS))
    max_layers = _MAX_LAYERS[read] if max_layers is None else max_layers
    require(max_layers >= 1, "max_layers", max_layers, "1 or more")
    num_layers = len(find_layers(model)[2])
    if candidates is None:
        candidates = range(num_layers // 3 if read == "entries" else 0, num_layers)
    # What is found comes in the order of the layers, whatever the order they are named in.
    layers = tuple(sorted(candidates))
    ids = torch.as_tensor(tokens, dtype=torch.int64).flatten()
    settings = {"window": window, "read": read, **settings}
    if read == "entries":
        tried = (0.0, 1.0, 2.0) if biases is None else biases
        return _calibrate_entries(model, ids, layers, max_layers, tried, progress, settings)
    require(biases is None, "biases", biases, "None: passages have no gates")
    return _calibrate_passages(model, ids, layers, max_layers, progress, settings)


_MAX_LAYERS = {"entries": 4, "passages": 1}


@torch.inference_mode(False)
def _calibrate_entries(
    model: Any,
    ids: Tensor,
    candidates: Sequence[int],
    max_layers: int,
    biases: Sequence[float],
    progress: Progress | None,
    settings: dict[str, Any],
) -> EntryCalibration:
    """See `calibrate`."""
    window = settings["window"]
    require(
        len(ids) > 4 * window,
        "tokens",
        len(ids),
        f"more than {4 * window}: four windows, of which the last two have something to retrieve",
    )
    require(
        not any(parameter.is_inference() for parameter in model.parameters()),
        "model",
        "loaded inside of torch.inference_mode()",
        "one that was loaded outside, which gradients can be computed of",
    )
    common = {"capacity": len(ids), "dtype": "float32", **settings}
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
    kept = {**settings, "bias": best}
    return EntryCalibration(
        heads, tuple(candidates), kept, slopes[first:].mean(0), without, found[best]
    )


def _calibrate_passages(
    model: Any,
    ids: Tensor,
    candidates: Sequence[int],
    max_layers: int,
    progress: Progress | None,
    settings: dict[str, Any],
) -> PassageCalibration:
    """See `calibrate`."""
    add_memory(model, candidates, **settings)
    try:
        attachment = get_attachment(model)
        num_sinks = attachment.settings.num_sinks
        least = LEAST_CHUNKS * CHUNK_LEN + num_sinks
        require(len(ids) >= least, "tokens", len(ids), f"{least:,} or more, to find places among")
        start_token = look_up_start_token(attachment.decoder.base.config)
        places = draw_places(ids, num_sinks, start_token)
        found = find_finders(attachment, ids, places, max_layers, progress)
    finally:
        remove_memory(model)
    calibration = PassageCalibration(
        found.heads, tuple(candidates), settings, found.single, found.ranks
    )
    if found.ranks.among_four < LEAST_FOUND:
        raise ConfigError(
            f"no heads of this model find passages of this text: the best are {calibration}; give "
            "a longer text, or read entries"
        )
    return calibration


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
        texts: read as one, up to eight windows, or for passages 8,192 tokens.
        progress: see `calibrate`.
        settings: as in `add_memory`, without layers and heads.

    Raises:
        ConfigError: there are too few tokens, or no head gains or finds passages.
    """
    num_tokens = _NUM_WINDOWS * settings.get("window", MemorySettings.window) + 1
    if settings.get("read", MemorySettings.read) == "passages":
        num_tokens = _NUM_TOKENS
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
