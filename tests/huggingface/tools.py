"""Tiny random models of every family, and what their attention should compute, token by token.

Sizes are different primes where a family allows it: heads come in groups, and what is rotated has
even length.
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    AutoConfig,
    AutoModelForCausalLM,
    DynamicCache,
)

from memorizing.huggingface import add_memory, remove_memory
from memorizing.huggingface.attaching.attachment import Attachment, find_attachment, get_attachment
from memorizing.huggingface.attaching.decoder import find_rotation
from memorizing.huggingface.releases import CACHE_NAME as CACHE

VOCAB_SIZE, HIDDEN, HEAD_DIM, NUM_LAYERS = 101, 52, 10, 3
WINDOW, SEGMENT_LEN, NUM_SINKS, NUM_NEIGHBORS, CAPACITY = 29, 13, 3, 5, 59
OWN_WINDOW, MAX_POSITIONS = 19, 211
LAYER = 1

_COMMON: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": HIDDEN,
    "intermediate_size": 61,
    "num_hidden_layers": NUM_LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": HEAD_DIM,
    "max_position_embeddings": MAX_POSITIONS,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "attention_dropout": 0.0,
}
_WITHOUT_HEAD_DIM = {k: v for k, v in _COMMON.items() if k != "head_dim"} | {"hidden_size": 40}
_TYPES = ["sliding_attention", "full_attention", "sliding_attention"]

# A family of every kind; `test_all_families` has them all.
CONFIGS: dict[str, dict[str, Any]] = {
    "gemma2": _COMMON
    | {"sliding_window": OWN_WINDOW, "layer_types": _TYPES, "attn_logit_softcapping": 7.0},
    "gemma3_text": _COMMON | {"sliding_window": OWN_WINDOW, "layer_types": _TYPES},
    "gpt2": {
        "vocab_size": VOCAB_SIZE,
        "n_embd": 52,
        "n_layer": NUM_LAYERS,
        "n_head": 4,
        "n_positions": MAX_POSITIONS,
        "scale_attn_by_inverse_layer_idx": True,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
        "attn_pdrop": 0.0,
        "resid_pdrop": 0.0,
        "embd_pdrop": 0.0,
    },
    "gpt_neox": {
        **_WITHOUT_HEAD_DIM,
        "hidden_size": 52,
        "num_key_value_heads": None,
        "rotary_pct": 0.5,
    },
    "llama": _COMMON,
    "mistral": _COMMON | {"sliding_window": OWN_WINDOW},
    "phi3": _WITHOUT_HEAD_DIM | {"partial_rotary_factor": 0.6, "sliding_window": None},
    "qwen3": _COMMON,
    "smollm3": _WITHOUT_HEAD_DIM | {"no_rope_layer_interval": 2},
}
ROTARY = sorted(CONFIGS.keys() - {"gpt2"})
IMPLEMENTATIONS = {name: ("eager",) if name == "gemma2" else ("sdpa", "eager") for name in CONFIGS}
"""Gemma 2 bounds its scores, which only its eager attention does."""
FAMILY_AND_IMPLEMENTATION = [
    (family, implementation)
    for family, implementations in sorted(IMPLEMENTATIONS.items())
    for implementation in implementations
]

_MODELS: dict[tuple[str, str], Any] = {}


def make_model(family: str = "llama", implementation: str = "", **changes: Any) -> Any:
    """A new model whose attention looks at some tokens much more than at others."""
    config = AutoConfig.for_model(family, **CONFIGS[family] | changes)
    implementation = implementation or IMPLEMENTATIONS[family][0]
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=implementation)
    shake_weights(model)
    return model.eval()


@torch.no_grad()
def shake_weights(model: Any) -> None:
    """Make attention look at some tokens much more than at others. In place."""
    for name, weight in model.named_parameters():
        if weight.dim() > 1:
            weight.normal_(0, 0.3 if "embed" in name or "wte" in name else 0.2)
        elif "norm" in name or "ln_" in name:
            weight += 0.2 * torch.randn_like(weight)
        elif "sinks" in name:
            weight.normal_()


def find_model(family: str = "llama", implementation: str = "") -> Any:
    """A model that tests share. It comes without a memory; a test must not change its weights."""
    implementation = implementation or IMPLEMENTATIONS[family][0]
    if (family, implementation) not in _MODELS:
        _MODELS[family, implementation] = make_model(family, implementation)
    model = _MODELS[family, implementation].eval()
    if (attachment := find_attachment(model)) is not None:
        attachment.unbind()
        remove_memory(model)
    return model


def give_memory(model: Any, **settings: Any) -> Attachment:
    """`add_memory` with small settings; what was read is not rounded."""
    add_memory(
        model,
        **{
            "layers": [LAYER],
            "window": WINDOW,
            "segment_len": SEGMENT_LEN,
            "num_sinks": NUM_SINKS,
            "num_neighbors": NUM_NEIGHBORS,
            "capacity": CAPACITY,
            "dtype": "float32",
            "read": "entries",
        }
        | settings,
    )
    return get_attachment(model)


@contextmanager
def memory_open(attachment: Attachment) -> Iterator[Attachment]:
    """Texts inside have memories of their own; nothing else was read."""
    attachment.bind({})
    try:
        yield attachment
    finally:
        attachment.unbind()


def make_tokens(num_rows: int, num_tokens: int, seed: int = 1) -> Tensor:
    """Random tokens (num_rows, num_tokens) that are not special."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCAB_SIZE, (num_rows, num_tokens), generator=generator)


def pad_left(texts: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Tokens and attention mask of a batch."""
    width = max(len(text) for text in texts)
    tokens = torch.zeros(len(texts), width, dtype=torch.int64)
    mask = torch.zeros(len(texts), width, dtype=torch.int64)
    for row, text in enumerate(texts):
        tokens[row, width - len(text) :] = text
        mask[row, width - len(text) :] = 1
    return tokens, mask


def call(model: Any, tokens: Tensor, cache: Any = None, **kwargs: Any) -> Any:
    """One call, which goes on with a cache."""
    return model(tokens, use_cache=True, **{CACHE: cache}, **kwargs)


def read(
    model: Any,
    tokens: Tensor,
    lengths: int | list[int],
    mask: Tensor | None = None,
    cache: DynamicCache | None = None,
) -> Tensor:
    """Logits of texts that are read in calls of so many tokens, as `generate` would make them.

    Several lengths are taken in turn, again and again.
    """
    position = None if mask is None else (mask.cumsum(1) - 1).clamp(min=0)
    cache = DynamicCache(config=model.config) if cache is None else cache
    start = cache.get_seq_length()
    logits = []
    turns = itertools.cycle([lengths] if isinstance(lengths, int) else lengths)
    while tokens.shape[1]:
        length = next(turns)
        piece, tokens = tokens[:, :length], tokens[:, length:]
        stop = start + piece.shape[1]
        output = call(
            model,
            piece,
            cache,
            attention_mask=None if mask is None else mask[:, :stop],
            position_ids=None if position is None else position[:, start:stop],
        )
        logits.append(output.logits)
        start = stop
    return torch.cat(logits, 1)


def list_seen(num_tokens: int, num_sinks: int, window: int = WINDOW) -> Tensor:
    """(T, T) bool: keys that each token sees, by the words of `MemorySettings`."""
    query, key = torch.arange(num_tokens).unsqueeze(1), torch.arange(num_tokens)
    return (key <= query) & ((query - key < window) | (key < num_sinks))


def run_densely(model: Any, tokens: Tensor, seen: Tensor, **kwargs: Any) -> Tensor:
    """Logits of the base model with an explicit mask; its own windows are kept."""
    base_mask = seen & (torch.ones_like(seen).triu(1 - OWN_WINDOW)).bool()
    is_windowed = getattr(model.config, "sliding_window", None) is not None
    types = getattr(model.config, "layer_types", None)

    def shape(mask: Tensor) -> Tensor:
        mask = mask.expand(len(tokens), 1, -1, -1)
        if model.config._attn_implementation == "sdpa":
            return mask
        return torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)

    mask: Any = shape(base_mask if is_windowed and types is None else seen)
    if types is not None and model.config.model_type in _TAKE_MASKS_BY_TYPE:
        mask = {"full_attention": shape(seen), "sliding_attention": shape(base_mask)}
    return model(tokens, attention_mask=mask, use_cache=False, **kwargs).logits


_TAKE_MASKS_BY_TYPE = ("gemma2", "gemma3_text", "qwen2", "qwen3", "smollm3")


class Naive:
    """Attention of a whole text with memory, by loops over tokens and heads; the oracle.

    It shares the parameters of the memory layer and nothing else: no cache, no store, no search, no
    mask. Texts are one row without padding, shorter than the model's own length. Keys and values
    from before a token's own segment take no gradient.
    """

    NAME = "naive_with_memory"

    def __init__(self, attachment: Attachment) -> None:
        """Take settings and gates from a model with memory."""
        self.settings = attachment.settings
        self.num_sinks = attachment.settings.num_sinks
        self.decoder = attachment.decoder
        self.layers = dict(attachment.layers)
        self.find_shift: Callable[[int], int] = lambda t: 0
        """By how much sinks are nearer to token t than they were, once out of the window."""
        self.find_first: Callable[[int], int] = lambda t: 0
        """The first token that token t may see besides sinks, if the window were endless."""

    def attend(
        self,
        module: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Any,
        scaling: float | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        """As `transformers` calls attention: (1, H, T, D) -> (1, T, H, D)."""
        scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
        number = self.decoder.attentions.index(module)
        num_groups = query.shape[1] // key.shape[1]
        is_plain = not self.find_shift(query.shape[2] - 1) and kwargs.get("s_aux") is None
        if number not in self.layers and is_plain:
            key, value = (part.repeat_interleave(num_groups, 1) for part in (key, value))
            return self._attend_densely(number, query, key, value, scaling, kwargs.get("softcap"))
        position = torch.arange(query.shape[2])
        free_query = query - 0
        free_key = key
        if self.decoder.rotated[number]:
            free_query = self._turn_back(number, query, position - self.settings.distance)
            free_key = self._turn_back(number, key, position)
        if self.settings.search == "normalized" and number in self.layers:
            norm = self.layers[number].key_norm
            free_key = free_key / free_key.norm(dim=-1, keepdim=True) * norm.view(-1, 1, 1)
        heads = []
        for head in range(query.shape[1]):
            kv = head // num_groups
            rows = [
                self._attend_one(
                    number, head, t, query[0, head], key[0, kv], value[0, kv],
                    free_query[0, head], free_key[0, kv], scaling, kwargs.get("softcap"),
                    kwargs.get("s_aux"),
                )
                for t in range(query.shape[2])
            ]  # fmt: skip
            heads.append(torch.stack(rows))
        return torch.stack(heads, 1).unsqueeze(0), None

    def _attend_densely(
        self,
        number: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scaling: float,
        softcap: float | None,
    ) -> tuple[Tensor, None]:
        """A layer without memory, by matrices."""
        num_tokens = query.shape[2]
        own = self.decoder.own_windows[number]
        is_own = own is not None and own <= self.settings.window
        window, num_sinks = (own, 0) if is_own else (self.settings.window, self.num_sinks)
        seen = list_seen(num_tokens, 0, window or 0)
        time = torch.arange(num_tokens)
        seen &= time >= torch.tensor([self.find_first(t) for t in range(num_tokens)]).unsqueeze(1)
        seen |= (time < num_sinks) & (time <= time.unsqueeze(1))
        segment = time // self.settings.segment_len
        is_new = segment.unsqueeze(1) == segment
        scores = torch.where(is_new, query @ key.mT, query @ key.detach().mT) * scaling
        weights = torch.softmax(self._bound(scores, softcap).masked_fill(~seen, -torch.inf), -1)
        output = (weights * is_new) @ value + (weights * ~is_new) @ value.detach()
        return output.transpose(1, 2), None

    def _attend_one(
        self,
        number: int,
        head: int,
        t: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        free_query: Tensor,
        free_key: Tensor,
        scaling: float,
        softcap: float | None,
        sinks: Tensor | None,
    ) -> Tensor:
        settings, layer = self.settings, self.layers.get(number)
        own = self.decoder.own_windows[number]
        window, num_sinks = settings.window, self.num_sinks
        if own is not None and own <= window:
            window, num_sinks = own, 0
        segment = t // settings.segment_len * settings.segment_len
        near = range(max(self.find_first(t), t - window + 1, 0), t + 1)
        seen = [j for j in range(t + 1) if j in near or j < num_sinks]
        if num_sinks and self.find_shift(t) and self.decoder.rotated[number]:
            shift = torch.full((num_sinks,), -self.find_shift(t))
            key = torch.cat([self._turn_back(number, key[:num_sinks], shift), key[num_sinks:]])
        local_keys = torch.stack([key[j] if j >= segment else key[j].detach() for j in seen])
        local_values = torch.stack([value[j] if j >= segment else value[j].detach() for j in seen])
        scores = self._bound(local_keys @ query[t] * scaling, softcap)
        if sinks is not None:
            # A score of nothing.
            scores = torch.cat([scores, sinks[head].view(1)])
            local_values = torch.cat([local_values, torch.zeros_like(local_values[:1])])
        stored = [
            j
            for j in range(max(0, segment - settings.capacity), segment)
            if j >= self.num_sinks and not (settings.combine == "joint" and j in near)
        ]
        local = torch.softmax(scores, 0) @ local_values
        if layer is None or not stored:
            return local
        products = free_key[stored].detach() @ free_query[t]
        best = products.detach().topk(min(settings.num_neighbors, len(stored))).indices
        found = self._bound(products[best] * scaling * torch.exp(layer.log_scale[head]), softcap)
        values = value[stored].detach()[best]
        if settings.combine == "gate":
            gate = torch.sigmoid(layer.bias[head])
            return gate * (torch.softmax(found, 0) @ values) + (1 - gate) * local
        weights = torch.softmax(torch.cat([scores, found + layer.bias[head]]), 0)
        return weights @ torch.cat([local_values, values])

    @staticmethod
    def _bound(scores: Tensor, softcap: float | None) -> Tensor:
        return scores if softcap is None else softcap * torch.tanh(scores / softcap)

    def _turn_back(self, number: int, x: Tensor, position: Tensor) -> Tensor:
        """What a layer rotated (..., n, D) by positions (n,), by the inverse of what it did.

        The family's own function tells what becomes of every unit vector; that it makes vectors
        longer stays.
        """
        cos, sin = self.decoder.look_up_rotation(number, position.unsqueeze(0), x)
        apply = find_rotation(self.decoder.attentions[number])
        assert apply is not None
        width = getattr(self.decoder.attentions[number], "rotary_ndims", x.shape[-1])
        # Every unit vector as a head, at all positions.
        unit = torch.eye(width).unsqueeze(1).expand(-1, len(position), -1).unsqueeze(0)
        pair = (unit,) if "x" in inspect.signature(apply).parameters else (unit, unit)
        rotated = apply(*pair, cos, sin)
        matrix = (rotated if len(pair) == 1 else rotated[0])[0].transpose(0, 1)
        turn = torch.linalg.inv(matrix / matrix.norm(dim=-1, keepdim=True))
        turned = (x[..., :width].unsqueeze(-2) @ turn).squeeze(-2)
        return torch.cat([turned, x[..., width:]], -1)


@contextmanager
def naive_attention(
    attachment: Attachment,
    *,
    has_memory: bool = True,
    find_shift: Callable[[int], int] = lambda t: 0,
    find_first: Callable[[int], int] = lambda t: 0,
) -> Iterator[Any]:
    """Inside, the model, whose memory is taken away, computes by `Naive`; gives the model."""
    naive, model = Naive(attachment), attachment.model()
    naive.find_shift, naive.find_first = find_shift, find_first
    if not has_memory:
        naive.layers = {}
    remove_memory(model)
    before = model.config._attn_implementation
    AttentionInterface.register(naive.NAME, naive.attend)
    AttentionMaskInterface.register(naive.NAME, lambda **kwargs: None)
    model.set_attn_implementation(naive.NAME)
    try:
        yield model
    finally:
        model.set_attn_implementation(before)
